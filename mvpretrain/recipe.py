"""A run as one frozen value: YAML in, every cross-check before a process group starts, YAML and JSON schema out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, WithJsonSchema, model_validator

from mvpretrain import encoders, evaluation, loggers, objectives, views
from mvpretrain.config import Config, sentences, unknown
from mvpretrain.data.build import Split, build_stream
from mvpretrain.data.loader import Stream, StreamConfig
from mvpretrain.data.sources.shards import ShardsConfig
from mvpretrain.data.sources.synthetic import SyntheticConfig
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.engine.optimizer import OptimizerConfig
from mvpretrain.engine.schedule import ScheduleConfig
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.evaluation._settings import EvaluationConfig
from mvpretrain.loggers._settings import LogConfig
from mvpretrain.model.task import Task
from mvpretrain.model.teacher import TeacherConfig
from mvpretrain.model.tower import TowerConfig
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.views import ViewConfig


class CheckpointConfig(Config):
    """A checkpoint every so many steps (and at the end and on SIGTERM); the last `keep`, and the best by `best`.

    `best` is a metric of the evaluation, larger being better: "retrieval/mean/R@1".
    """

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    best: str = "retrieval/mean/R@1"


class Recipe(Config):
    """Everything that a run is; `resolved` in its folder and in its checkpoints."""

    run: str
    data: Annotated[ShardsConfig | SyntheticConfig, Field(discriminator="kind")]
    views: dict[
        str,
        Annotated[
            SerializeAsAny[ViewConfig], BeforeValidator(views.registry.parse), WithJsonSchema({"registry": "view"})
        ],
    ]
    towers: dict[str, TowerConfig]
    objective: Annotated[
        SerializeAsAny[ObjectiveConfig],
        BeforeValidator(objectives.registry.parse),
        WithJsonSchema({"registry": "objective"}),
    ]
    teacher: TeacherConfig | None = None
    dim: int = Field(default=128, ge=1)
    batch: int = Field(ge=2)  # global: the batch sequence, and so the run, does not depend on the number of ranks
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    seed: int = 0
    init: str | None = None  # weights.safetensors of another run to start from; what it lacks is fresh
    loader: StreamConfig = StreamConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_nonfinite: int = Field(default=10, ge=0)  # steps with a non-finite loss or gradient in a row that are skipped

    @model_validator(mode="after")
    def _cross_check(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps} epochs={self.epochs}")
        if len(self.views) < 2:
            raise ValueError(f"contrastive learning needs two views or more, got {list(self.views)}")
        for name, view in self.views.items():
            tower = view.tower or name
            if tower not in self.towers:
                raise ValueError(
                    f"view {name!r} has no encoder: add towers.{tower}, or name one of "
                    f"{list(self.towers)} as views.{name}.tower"
                )
        for name in self.towers:
            if name not in self.towers_of_views().values():
                raise ValueError(f"tower {name!r} encodes no view; remove it, or set views.<name>.tower={name}")
        if self.teacher:
            self.teacher.check(list(self.views), self.engine.ranks)
        self.objective.check(self.columns())
        for tower in self.towers.values():
            tower.head.check(self.dim, self.objective.projection_heads())
        for name in self.evaluation.by_label:
            if name not in self.views:
                raise ValueError(unknown("view in evaluation.by_label", name, self.views))
        if self.evaluation.by_label and isinstance(self.data, ShardsConfig) and self.data.label is None:
            raise ValueError("evaluation.by_label scores by class: name the field of the class as data.label")
        if self.engine.ranks and self.batch % self.engine.ranks:
            raise ValueError(f"batch={self.batch} does not divide over engine.ranks={self.engine.ranks}")
        return self

    def towers_of_views(self) -> dict[str, str]:
        """View name -> name of the tower that encodes it."""
        return {name: view.tower or name for name, view in self.views.items()}

    def columns(self) -> list[str]:
        """The views that the objective is given: those of the samples, then the teacher's."""
        return [*self.views, *(self.teacher.names(self.views) if self.teacher else ())]

    def total_steps(self, samples: int) -> int:
        """Optimiser steps of the run over an epoch of this many samples."""
        return self.steps or math.ceil((self.epochs or 0) * samples / self.batch)

    def task(self, collectives: Collectives) -> Task:
        """The module that the engine wraps, freshly initialised from torch's generator."""
        objective = self.objective.for_dim(self.dim).build(self.columns(), collectives)
        heads = self.objective.projection_heads()
        return Task(self.towers_of_views(), self.towers, self.dim, objective, collectives, heads, self.teacher)

    def stream(self, split: Split, rank: int = 0, size: int = 1) -> Stream | None:
        """The batches of a split for one rank; None where the recipe names no `data.eval`."""
        pin = self.engine.device != "cpu" and torch.cuda.is_available()
        return build_stream(self.data, self.views, split, self.batch, self.seed, self.loader, rank, size, pin)

    def dump(self) -> str:
        """The resolved recipe as YAML that `load` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (or a run folder), with `key.sub=value` overrides whose values are YAML.

    ValueError, one line a problem: no such file, not YAML, unknown key, bad value, or views, towers and objective that
    do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe at {str(path)!r}; give a YAML file such as those in recipes/, or a run's folder")
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(value).__name__}")
    for override in overrides:
        _override(value, override)
    return parse(value)


def parse(value: dict[str, Any]) -> Recipe:
    """A recipe from a mapping. ValueError: one line a problem."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise ValueError(sentences(error)) from error


def _override(value: dict[str, Any], text: str) -> None:
    """Set one `key.sub=value` in place."""
    path, equals, given = text.partition("=")
    if not equals or not path:
        raise ValueError(f"override {text!r} is not of the form key.sub=value")
    *parents, last = path.split(".")
    here: Any = value
    for key in parents:
        here = here[_position(key, here, text)] if isinstance(here, list) else here.setdefault(key, {})
        if not isinstance(here, dict | list):
            raise ValueError(f"override {text!r}: {key!r} holds {here!r}, not a group of settings")
    try:
        parsed = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: {given!r} is not a YAML value; quote text with braces in it") from error
    if isinstance(here, list):
        here[_position(last, here, text)] = parsed
    else:
        here[last] = parsed


def _position(key: str, items: list[Any], text: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ValueError(f"override {text!r}: {key!r} is not a position in a list of {len(items)}")
    return int(key)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, every view, encoder and objective kind included."""
    # pydantic follows references while it writes a schema, so that those to the registries are put in afterwards.
    whole = _through_doors(json.dumps(Recipe.model_json_schema()))
    definitions = whole.setdefault("$defs", {})
    for name, registry in (
        ("view", views.registry),
        ("encoder", encoders.registry),
        ("objective", objectives.registry),
        ("logger", loggers.registry),
        ("evaluator", evaluation.registry),
    ):
        for kind in registry.kinds():
            # Kinds reuse names such as Augment; a place of its own keeps each one's definitions apart.
            one = json.dumps(registry.config(kind).model_json_schema())
            definitions[f"{name}-{kind}"] = _through_doors(one.replace("#/$defs/", f"#/$defs/{name}-{kind}/$defs/"))
        definitions[name] = {"anyOf": [{"$ref": f"#/$defs/{name}-{kind}"} for kind in registry.kinds()]}
    return whole


def _through_doors(text: str) -> dict[str, Any]:
    """A schema as JSON text, what comes through a registry being any of its kinds."""
    return json.loads(re.sub(r'"registry": "(\w+)"', r'"$ref": "#/$defs/\1"', text))

"""A run as one frozen value: YAML in, every cross-check before a process group starts, YAML and JSON schema out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, PrivateAttr, SerializeAsAny, TypeAdapter, ValidationError, model_validator
from pydantic.json_schema import CoreRef, GenerateJsonSchema

from mvpretrain import objectives, views
from mvpretrain.config import Config, check_name, sentences, unknown
from mvpretrain.data import sources
from mvpretrain.data.build import Split, build_stream
from mvpretrain.data.loader import Stream, StreamConfig
from mvpretrain.data.sources import SourceConfig
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
from mvpretrain.registry import Registry, search_in, trusting
from mvpretrain.views import ViewConfig

AnyView = Annotated[SerializeAsAny[ViewConfig], views.registry]
AnyObjective = Annotated[SerializeAsAny[ObjectiveConfig], objectives.registry]


class CheckpointConfig(Config):
    """A checkpoint every so many steps (and at the end and on SIGTERM); the last `keep`, and the best by `best`.

    `best` is a metric of the evaluation, larger being better: "retrieval/mean/R@1".
    """

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    best: str = "retrieval/mean/R@1"


class Recipe(Config):
    """Everything that a run is. With every default filled in, it is kept in the run's folder."""

    run: str
    data: Annotated[SerializeAsAny[SourceConfig], sources.registry]
    views: dict[str, AnyView]
    towers: dict[str, TowerConfig]
    objective: AnyObjective
    teacher: TeacherConfig | None = None
    dim: int = Field(default=128, ge=1)  # of one head: an objective of several has rows of so many times that
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
    _trusted: bool = PrivateAttr(default=True)

    @model_validator(mode="after")
    def _cross_check(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps} epochs={self.epochs}")
        if len(self.views) < 2:
            raise ValueError(f"contrastive learning needs two views or more, got {list(self.views)}")
        for name, view in self.views.items():
            check_name("view", name)
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
            tower.head.check(self.objective.projection_heads())
        for name in self.evaluation.by_label:
            if name not in self.views:
                raise ValueError(unknown("view in evaluation.by_label", name, self.views))
        if self.evaluation.by_label and not self.data.labelled:
            raise ValueError("evaluation.by_label scores by class: name the field of the class as data.label")
        if self.engine.ranks and self.batch % self.engine.ranks:
            raise ValueError(f"batch={self.batch} does not divide over engine.ranks={self.engine.ranks}")
        return self

    def __eq__(self, other: object) -> bool:
        """Equal settings, wherever they were read."""
        return isinstance(other, Recipe) and dict(self) == dict(other)

    @property
    def trusted(self) -> bool:
        """Whether code that the recipe names may run: False for one that was read from a folder, unless trusted."""
        return self._trusted

    def towers_of_views(self) -> dict[str, str]:
        """View name -> name of the tower that encodes it."""
        return {name: view.tower or name for name, view in self.views.items()}

    def columns(self) -> list[str]:
        """The views that the objective is given: those of the samples, then the teacher's."""
        return [*self.views, *(self.teacher.names(self.views) if self.teacher else ())]

    def row_dim(self) -> int:
        """The width of an embedding: all heads, side by side."""
        return self.dim * self.objective.projection_heads()

    def total_steps(self, samples: int) -> int:
        """Optimiser steps of the run over an epoch of this many samples."""
        return self.steps or math.ceil((self.epochs or 0) * samples / self.batch)

    def task(self, collectives: Collectives) -> Task:
        """The module that the engine wraps, freshly initialised from torch's generator."""
        objective = self.objective.for_dim(self.row_dim()).build(self.columns(), collectives)
        heads = self.objective.projection_heads()
        return Task(self.towers_of_views(), self.towers, self.dim, objective, collectives, heads, self.teacher)

    def stream(self, split: Split, rank: int = 0, size: int = 1) -> Stream | None:
        """The batches of a split for one rank; None where the recipe names no `data.eval`."""
        pin = self.engine.device != "cpu" and torch.cuda.is_available()
        return build_stream(self.data, self.views, split, self.batch, self.seed, self.loader, rank, size, pin)

    def dump(self) -> str:
        """The resolved recipe as YAML that `load` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


def load(path: str | Path, overrides: Sequence[str] = (), trust: bool = False) -> Recipe:
    """A recipe from a YAML file (or a run folder), with `key.sub=value` overrides whose values are YAML.

    The file may extend others: see `read`. A file is trusted: it may name classes outside of this package, which are
    also looked for in its folder, and shell commands as urls. A folder may hold anyone's recipe, and may name them only
    with `trust`. ValueError, one line a problem: no such file, not YAML, unknown key, bad value, what is not trusted,
    or views, towers and objective that do not fit together.
    """
    path = Path(path)
    value = read(path)
    for override in overrides:
        _override(value, override)
    trusted = trust or not path.is_dir()
    if trusted:
        search_in(path if path.is_dir() else path.parent)
    with trusting(trusted):
        recipe = parse(value)
    recipe._trusted = trusted
    return recipe


def read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file (or in a run folder's), laid over those of the files that it names as `extends`.

    `extends` is a path or a list of paths, relative to the file's own folder; a later one is laid over an earlier one,
    and they may extend further files. `extending` are the files on the way here. Nothing else is opened, and no class
    is imported. ValueError: a file that is missing or holds no mapping, files that extend each other in a circle, or a
    run folder's recipe that extends anything or is extended: those are written whole, and may be anyone's.
    """
    folder = path.is_dir()
    if folder and extending:
        raise ValueError(f"{extending[-1]} extends the folder {str(path)!r}; name a recipe's file")
    path = path / "recipe.yaml" if folder else path
    chain = (*extending, path)
    if path.resolve() in [other.resolve() for other in extending]:
        raise ValueError(f"recipes extend each other in a circle: {' -> '.join(map(str, chain))}; take one extends out")
    if not path.is_file():
        wanted = f", which {extending[-1]} extends" if extending else ""
        raise ValueError(
            f"no recipe at {str(path)!r}{wanted}; give a YAML file (`mvpretrain recipe new` writes one from shards) or "
            "a run's folder"
        )
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(value).__name__}")
    if folder and "extends" in value:
        raise ValueError(f"{path} extends other files, as no run's recipe does; give the file itself, if you trust it")
    whole: dict[str, Any] = {}
    for base in _bases(path, value.pop("extends", [])):
        whole = laid_over(whole, read(base, chain))
    return laid_over(whole, value)


def _bases(path: Path, named: Any) -> list[Path]:
    """The files that the recipe at `path` extends. ValueError: neither a path nor a list of paths."""
    listed = [named] if isinstance(named, str) else named
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{path}: extends is a path or a list of paths to recipes, got {named!r}")
    return [path.parent / Path(name).expanduser() for name in listed]


def laid_over(base: Any, over: Any) -> Any:
    """`over` in place of `base`, mappings key by key; a mapping of another `kind` replaces the one below it whole."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in base and over.get("kind", base["kind"]) != base["kind"]:
        return over
    return base | {key: laid_over(base.get(key), value) for key, value in over.items()}


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
    if path == "extends":
        raise ValueError(f"override {text!r}: write what a recipe extends in its file")
    *parents, last = path.split(".")
    group: Any = value
    for key in parents:
        group = group[_position(key, group, text)] if isinstance(group, list) else group.setdefault(key, {})
        if not isinstance(group, dict | list):
            raise ValueError(f"override {text!r}: {key!r} holds {group!r}, not a group of settings")
    try:
        parsed = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: {given!r} is not a YAML value; quote text with braces in it") from error
    if isinstance(group, list):
        group[_position(last, group, text)] = parsed
    else:
        group[last] = parsed


def _position(key: str, items: list[Any], text: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ValueError(f"override {text!r}: {key!r} is not a position in a list of {len(items)}")
    return int(key)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe's file, with the settings of every kind of every registry, for editors."""
    whole = Recipe.model_json_schema(schema_generator=_KindsSchema)
    path = {"type": "string"}
    whole["properties"]["extends"] = {"anyOf": [path, {"type": "array", "items": path}]}
    # A file that extends others need not say what they do.
    whole["anyOf"] = [{"required": whole.pop("required")}, {"required": ["extends"]}]
    return whole


class _KindsSchema(GenerateJsonSchema):
    """JSON schema in which a field that holds settings of a registry may hold those of any of its kinds."""

    def generate_inner(self, schema: Any) -> dict[str, Any]:
        registry = (schema.get("metadata") or {}).get("registry")
        return super().generate_inner(schema) if registry is None else self.any_kind(registry)

    def any_kind(self, registry: Registry[Any]) -> dict[str, Any]:
        """A reference to the definition of all the registry's kinds, which is written when it is first asked for."""
        name, reference = self.get_cache_defs_ref_schema(CoreRef(registry.noun))
        if name not in self.definitions:
            self.definitions[name] = {}  # holds the name: a kind such as `sum` has settings of its own registry in it
            external = {"properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
            found = [self.generate_inner(TypeAdapter(registry.config(k)).core_schema) for k in registry.kinds()]
            self.definitions[name] = {"anyOf": [*found, external]}
        return reference

"""What the runs of objectives.py and tailed.py measure alike: held-out embeddings, features, the time of a step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvpretrain.data.build import Split, build_stream, build_transforms
from mvpretrain.data.loader import Stream
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation._collect import Table, collect
from mvpretrain.model.task import Task
from mvpretrain.model.tower import Tower
from mvpretrain.recipe import Recipe
from tools.compare.experiment import DataSet

ROWS = 256  # encoded at once in evaluation
CPU = torch.device("cpu")


def stream(recipe: Recipe, split: Split, views: Sequence[str], augmented: bool) -> Stream:
    transforms = {v: t for v, t in build_transforms(recipe.views, augmented).items() if v in views}
    found = build_stream(recipe.data, recipe.views, split, ROWS, recipe.seed, recipe.loader, transforms=transforms)
    assert found is not None, f"{recipe.run} has no {split} samples"
    return found


@torch.no_grad()
def embedded(recipe: Recipe, task: Task, data: DataSet) -> Table:
    """The held-out samples in the shared space."""
    batches = stream(recipe, "eval", list(recipe.views), data.augmented).whole(data.rows[1])
    return collect(task, batches, SingleProcess(), CPU)


@torch.no_grad()
def features(
    recipe: Recipe, task: Task, split: Split, views: Sequence[str], limit: int
) -> tuple[dict[str, Tensor], Tensor]:
    """(encoders' outputs before the head, labels) of the samples of a split, not augmented."""
    found: dict[str, list[Tensor]] = {v: [] for v in views}
    labels = []
    for batch in stream(recipe, split, views, augmented=False).whole(limit):
        whole = torch.stack(list(batch.present.values())).all(dim=0)
        labels.append(batch.labels[whole])
        for v in views:
            tower = task.towers[task.views[v]]
            assert isinstance(tower, Tower)
            found[v].append(tower.encoder(batch.views[v])[whole])
    return {v: torch.cat(parts) for v, parts in found.items()}, torch.cat(labels)


def sizes(recipe: Recipe, train: int, labelled: int, held_out: int) -> dict[str, int]:
    """Numbers of samples; `seen` counts repeats."""
    seen = recipe.batch * recipe.total_steps(train)
    return {"seen": seen, "train": train, "labelled": labelled, "held_out": held_out}


def logged(recipe: Recipe) -> dict[str, Any]:
    """Milliseconds of a step by phase, from the log, and its last record; {} where nothing was trained."""
    path = Path(recipe.run) / "log.jsonl"
    if not path.is_file():
        return {}
    log = [json.loads(line) for line in path.read_text().splitlines()]
    # The first record has what a process does once.
    records = log[1:] or log
    phases = [name for name in log[-1] if name.startswith("time/")]
    return {
        "phases": {name.removeprefix("time/"): statistics.mean(r[name] for r in records) for name in phases},
        "last": log[-1],
    }

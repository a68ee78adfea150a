"""Checkpoints as folders: whole or not there, kept as many as asked for, found again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvpretrain import recipe
from mvpretrain.data.loader import Cursor
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.engine import World
from mvpretrain.training import checkpoint
from mvpretrain.training.checkpoint import TrainState
from tests.runs import settings


class Plain:
    """An engine of one number: what checkpoints ask of engines, and nothing else."""

    def __init__(self, kind: str = "none", size: int = 1):
        self.world = World(kind, "fp32", torch.device("cpu"), 0, size, SingleProcess())
        self.value = 0.0
        self.fails = False
        self.task = torch.nn.Module()

    def save(self, folder: Path) -> None:
        (folder / "engine").write_text(str(self.value))
        if self.fails:
            raise KeyboardInterrupt

    def restore(self, folder: Path) -> None:
        self.value = float((folder / "engine").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return {"value": torch.tensor([self.value])}


def state_at(step: int) -> TrainState:
    return TrainState(step, Cursor(1, (step, 2)), {"no such field": 3}, {"retrieval/mean/R@1": 0.5})


def saved(run: Path, *steps: int, keep: int = 2, engine: Any = None, bests: dict[int, float] | None = None) -> Any:
    """Checkpoints of these steps, some of which were evaluated first."""
    engine = engine or Plain()
    plan = recipe.parse(settings(run.parent, checkpoint={"keep": keep}))
    for step in steps:
        engine.value = float(step)
        if bests and step in bests:
            checkpoint.note_best(run, step, "R@1", bests[step], SingleProcess())
        checkpoint.save(run, engine, state_at(step), plan.dump(), plan.batch, keep)
    return engine


def names(run: Path) -> list[int]:
    return [int(p.name[-8:]) for p in checkpoint.saved(run)]


def test_what_was_saved_comes_back(tmp_path):
    saved(tmp_path, 3, 12)
    engine: Any = Plain()
    assert checkpoint.restore(checkpoint.find(tmp_path, "3"), engine) == state_at(3) and engine.value == 3.0
    assert checkpoint.restore(checkpoint.find(tmp_path), engine) == state_at(12) and engine.value == 12.0
    files = {p.name for p in checkpoint.find(tmp_path).iterdir()}
    assert files == {"engine", "meta.json", "rank-0.pt", "recipe.yaml", "weights.safetensors"}
    wanted = recipe.parse(settings(tmp_path.parent, checkpoint={"keep": 2}))
    assert recipe.load(checkpoint.find(tmp_path)).dump() == wanted.dump()


def test_generators_go_on_where_they_were(tmp_path):
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    engine = saved(tmp_path, 1)
    wanted = [draw() for _ in range(3)]
    draw()
    checkpoint.restore(checkpoint.find(tmp_path), engine)
    assert [draw() for _ in range(3)] == wanted


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept(tmp_path, keep, left):
    saved(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert names(tmp_path) == left


def test_the_best_one_is_kept_and_found(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, bests={1: 0.2, 2: 0.7, 3: 0.7, 4: 0.1})
    assert names(tmp_path) == [2, 4, 5]
    assert checkpoint.find(tmp_path, "best").name == "step-00000002"
    saved(tmp_path, 6, 7, 8, bests={6: 0.9})
    assert names(tmp_path) == [6, 7, 8] and checkpoint.best(tmp_path) == "step-00000006"


def test_a_best_step_that_was_killed_before_it_was_saved_is_none(tmp_path):
    """It is evaluated again after the resume, and must then be noted and saved again."""
    saved(tmp_path, 4)
    assert checkpoint.note_best(tmp_path, 5, "R@1", 0.9, SingleProcess())
    assert checkpoint.best(tmp_path) is None
    assert checkpoint.note_best(tmp_path, 5, "R@1", 0.9, SingleProcess())
    saved(tmp_path, 5)
    assert checkpoint.best(tmp_path) == "step-00000005"
    assert not checkpoint.note_best(tmp_path, 6, "R@1", 0.9, SingleProcess())


def test_a_save_that_was_killed_is_not_there_and_not_in_the_way(tmp_path):
    engine = saved(tmp_path, 1)
    engine.fails = True
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 2, engine=engine)
    left = tmp_path / "checkpoints/.step-00000002"
    assert (left / "engine").is_file() and names(tmp_path) == [1]
    assert checkpoint.find(tmp_path).name == "step-00000001"
    (left / "rank-7.pt").write_text("of another world")
    engine.fails = False
    saved(tmp_path, 2, engine=engine)
    assert names(tmp_path) == [1, 2] and not left.exists()
    assert not (checkpoint.find(tmp_path) / "rank-7.pt").exists()


def test_a_folder_without_its_last_file_is_no_checkpoint(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step-00000002/meta.json").unlink()
    assert names(tmp_path) == [1]
    saved(tmp_path, 2)
    assert names(tmp_path) == [1, 2]


def test_find_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint"):
        checkpoint.find(tmp_path)
    saved(tmp_path, 12, 3)
    assert checkpoint.find(tmp_path, "step-00000003").name == "step-00000003"
    for which in ("7", "best", "latest"):
        with pytest.raises(ValueError, match=f"no checkpoint '{which}'; it has step-00000003, step-00000012, last"):
            checkpoint.find(tmp_path, which)


@pytest.mark.parametrize(("kind", "size"), [("zero1", 2), ("zero2", 4), ("zero2", 1)])
def test_zero_is_refused_under_another_stage_or_size(tmp_path, kind, size):
    path = checkpoint.find(tmp_path) if saved(tmp_path, 5, engine=Plain("zero2", 2)) else tmp_path
    engine: Any = Plain(kind, size)
    with pytest.raises(ValueError, match="written by 2 ranks under zero2") as refusal:
        checkpoint.restore(path, engine)
    assert f"this run has {size} under {kind}" in str(refusal.value) and engine.value == 0.0
    assert str(path / "weights.safetensors") in str(refusal.value)


def test_the_state_is_readable_by_people(tmp_path):
    saved(tmp_path, 5)
    meta = json.loads((checkpoint.find(tmp_path) / "meta.json").read_text())
    assert meta["step"] == 5 and meta["kind"] == "none" and meta["size"] == 1 and meta["batch"] == 8


def test_a_generators_file_runs_nothing(tmp_path):
    """A run folder may come from elsewhere, and a pickle can name any function."""
    engine = saved(tmp_path, 1)
    path = checkpoint.find(tmp_path)
    torch.save({"torch": Command(str(tmp_path / "mark"))}, path / "rank-0.pt")
    with pytest.raises(ValueError, match=r"rank-0\.pt holds more than the states of random generators"):
        checkpoint.restore(path, engine)
    assert not (tmp_path / "mark").exists()


class Command:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)

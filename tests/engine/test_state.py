"""What an engine writes down, and that going on from it is going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvpretrain import objectives
from mvpretrain.data.loader import Cursor
from mvpretrain.distributed import sample_state
from mvpretrain.engine import encoding
from mvpretrain.model.heads import HeadConfig
from mvpretrain.model.teacher import TeacherConfig
from mvpretrain.training import checkpoint
from mvpretrain.training.checkpoint import TrainState
from tests.engine.small import ROWS, batch_of, engine_of, held, optimizer_of, rows_of, task_of

HERE = TrainState(3, Cursor(0, (36,)), {}, {})


def noisy(kind: str, norm: str = "batch", teacher: TeacherConfig | None = None, **settings: Any) -> Any:
    """An engine whose steps draw random numbers (dropout), with moments (AdamW) and batch statistics."""
    changes = {"encoder": {"dropout": 0.3}, "head": HeadConfig(layers=2, norm=norm), "teacher": teacher}
    return engine_of(
        kind, lambda collectives: task_of(3, torch.float32, collectives, **changes), optimizer_of, **settings
    )


def advance(engine: Any, start: int, steps: int) -> list[float]:
    world = engine.world
    return [engine.step(rows_of(batch_of(3, seed=start + i), world.rank, world.size), [1.0]).loss for i in range(steps)]


def evaluated(engine: Any) -> Tensor:
    """What evaluation sees on this rank: all ranks are given the same rows."""
    with encoding(engine) as task:
        return torch.stack(list(task.encode(batch_of(3, seed=99)).z.values()))


def whole_and_resumed(
    rank: int, kind: str, folder: Path, micro_batch: int | None = None, teacher: TeacherConfig | None = None
) -> tuple[dict[str, bool], Tensor, dict[str, Tensor]]:
    """Six steps, against three, a checkpoint, and three from it: what is equal, what evaluation sees, the weights."""
    engine = noisy(kind, teacher=teacher, micro_batch=micro_batch)
    torch.manual_seed(rank)
    advance(engine, 0, 3)
    checkpoint.save(folder, engine, HERE, "", ROWS, keep=2)
    losses, seen, weights = advance(engine, 3, 3), evaluated(engine), engine.weights()
    fresh = noisy(kind, teacher=teacher, micro_batch=micro_batch)
    torch.manual_seed(7)  # a new process's generators know nothing of the old
    equals = {"train state": checkpoint.restore(checkpoint.find(folder), fresh) == HERE}
    equals |= {"losses": losses == advance(fresh, 3, 3), "evaluation": torch.equal(seen, evaluated(fresh))}
    equals |= {"weights": equal(weights, fresh.weights()), "state": held(engine) == held(fresh)}
    return equals, seen, weights


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_going_on_from_a_checkpoint_is_going_on_bit_for_bit(ranks, tmp_path, kind):
    (equals, seen, weights), (others, seen_there, none) = ranks(2).run(whole_and_resumed, kind, tmp_path)
    assert all(equals.values()) and all(others.values()), (equals, others)
    assert torch.equal(seen, seen_there)  # one evaluation, whichever rank encodes a sample
    shapes = {name: value.shape for name, value in noisy("none").task.state_dict().items()}
    assert {name: value.shape for name, value in weights.items()} == shapes and not none
    assert load_file(checkpoint.find(tmp_path) / "weights.safetensors").keys() == shapes.keys()


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_going_on_with_micro_batches(ranks, tmp_path, kind):
    for equals, _, _ in ranks(2).run(whole_and_resumed, kind, tmp_path, 3):
        assert all(equals.values()), equals


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_going_on_in_one_process(tmp_path, micro_batch):
    equals, _, weights = whole_and_resumed(0, "none", tmp_path, micro_batch)
    assert all(equals.values()), equals
    assert len(weights) == len(noisy("none").task.state_dict())


WITH_TEACHER = TeacherConfig(momentum=0.5, views=("v1", "v2"), queue=16)


def assert_teacher_moved(equals: dict[str, bool], weights: dict[str, Tensor]) -> None:
    assert all(equals.values()), equals
    ids, name = weights["teacher.queue.ids"], "head.0.weight"
    assert len(ids) == WITH_TEACHER.queue and not (ids == -1).any()
    assert not torch.equal(weights[f"teacher.towers.t0.{name}"], weights[f"towers.t0.{name}"])


@pytest.mark.parametrize(("kind", "micro_batch"), [("ddp", None), ("ddp", 3), ("zero1", None), ("zero3", None)])
def test_going_on_with_a_teacher_and_its_queue(ranks, tmp_path, kind, micro_batch):
    (equals, _, weights), (others, *_) = ranks(2).run(whole_and_resumed, kind, tmp_path, micro_batch, WITH_TEACHER)
    assert_teacher_moved(equals | {f"{name} on rank 1": one for name, one in others.items()}, weights)


def test_going_on_with_a_teacher_in_one_process(tmp_path):
    equals, _, weights = whole_and_resumed(0, "none", tmp_path, None, WITH_TEACHER)
    assert_teacher_moved(equals, weights)


def weights_and_embedding(rank: int, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    engine = noisy(kind)
    advance(engine, 0, 2)
    return engine.weights(), evaluated(engine)


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_plain_weights_are_the_model(ranks, kind):
    """Put into a task that knows no engine, they give what the engine's own gives."""
    weights, seen = ranks(2).run(weights_and_embedding, kind)[0]
    plain = noisy("none")
    plain.task.load_state_dict(weights)
    torch.testing.assert_close(evaluated(plain), seen, rtol=0, atol=1e-6)


def written(rank: int, kind: str, folder: Path, norm: str = "batch") -> None:
    engine = noisy(kind, norm)
    advance(engine, 0, 3)
    checkpoint.save(folder, engine, HERE, "", ROWS, keep=2)


def refused(rank: int, kind: str, folder: Path) -> str:
    engine = noisy(kind)
    before = held(engine)
    try:
        checkpoint.restore(checkpoint.find(folder), engine)
    except ValueError as error:
        assert before == held(engine)
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("one", "other", "size"), [("zero2", "zero3", 2), ("zero2", "zero1", 2), ("zero2", "zero2", 4)]
)
def test_zero_checkpoints_stay_with_their_stage_and_ranks(ranks, tmp_path, one, other, size):
    ranks(2).run(written, one, tmp_path)
    for text in ranks(size).run(refused, other, tmp_path):
        assert f"written by 2 ranks under {one}, this run has {size} under {other}" in text
        assert f"{tmp_path}/checkpoints/step-00000003/weights.safetensors (init=...)" in text


@pytest.mark.parametrize(("one", "other"), [("zero2", "ddp"), ("ddp", "zero2")])
def test_plain_and_zero_checkpoints_are_not_each_other(ranks, tmp_path, one, other):
    ranks(2).run(written, one, tmp_path)
    for text in ranks(2).run(refused, other, tmp_path):
        assert str(tmp_path) in text and ("the kind it had" in text or "start it as it was" in text)


def taken_over(rank: int, kind: str, folder: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    engine = noisy(kind, "layer")  # one of four ranks has a single row, which has no variance
    state = checkpoint.restore(checkpoint.find(folder), engine)
    loaded = engine.weights()
    return advance(engine, state.step, 2), loaded, engine.weights()


def test_a_ddp_checkpoint_goes_on_with_other_ranks(ranks, tmp_path):
    ranks(2).run(written, "ddp", tmp_path, "layer")
    saved = load_file(checkpoint.find(tmp_path) / "weights.safetensors")
    for losses, loaded, after in (ranks(4).run(taken_over, "ddp", tmp_path)[0], taken_over(0, "none", tmp_path)):
        assert equal(loaded, saved) and not equal(after, saved)
        assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))


INDIVIDUAL = {"kind": "isogclr", "init": 0.3, "gamma": {"value": 0.5}}


def individual(kind: str, dtype: torch.dtype, **settings: Any) -> Any:
    """An engine whose objective keeps numbers by sample id."""

    def made(collectives: Any) -> Any:
        return task_of(3, dtype, collectives, objectives.build(INDIVIDUAL, ["v0", "v1", "v2"], collectives))

    return engine_of(kind, made, optimizer_of, **settings)


def kept(engine: Any) -> dict[int, list[float]]:
    ids, rows = next(part for _, part in sample_state.states_in(engine.task)).items()
    return dict(zip(ids.tolist(), rows.tolist(), strict=True))


def learned(engine: Any, start: int, steps: int) -> None:
    world = engine.world
    for i in range(start, start + steps):
        batch = batch_of(3, torch.float64, seed=i) if next(engine.task.parameters()).dtype == torch.float64 else None
        batch = batch or batch_of(3, seed=i)
        # Half of the samples of a batch are new.
        engine.step(rows_of(batch._replace(ids=batch.ids + 6 * i), world.rank, world.size))


def begun(rank: int, kind: str, folder: Path, dtype: torch.dtype) -> None:
    engine = individual(kind, dtype)
    learned(engine, 0, 3)
    checkpoint.save(folder, engine, HERE, "", ROWS, keep=2)


def ended(rank: int, kind: str, folder: Path, dtype: torch.dtype) -> tuple[dict[int, list[float]], dict[str, Tensor]]:
    engine = individual(kind, dtype)
    learned(engine, 50, 1)  # forgotten by what comes back
    state = checkpoint.restore(checkpoint.find(folder), engine)
    learned(engine, state.step, 3)
    return kept(engine), engine.weights()


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "sizes"),
    [
        ("ddp", torch.float64, 1e-9, (2, 4)),
        ("ddp", torch.float64, 1e-9, (2, 2)),
        ("zero2", torch.float32, 1e-4, (2, 2)),
    ],
)
def test_numbers_by_sample_go_on_with_other_ranks(ranks, tmp_path, kind, dtype, tolerance, sizes):
    """u, tau, momenta and weights of a run that was interrupted are those of one process that was not."""
    alone = individual("none", dtype)
    learned(alone, 0, 6)
    wanted = kept(alone)
    ranks(sizes[0]).run(begun, kind, tmp_path, dtype)
    parts = ranks(sizes[1]).run(ended, kind, tmp_path, dtype)
    found = {name: row for part, _ in parts for name, row in part.items()}
    assert found.keys() == wanted.keys() and len(found) == sum(len(part) for part, _ in parts)
    for name, row in wanted.items():
        assert found[name] == pytest.approx(row, rel=tolerance, abs=tolerance, nan_ok=True)
    for name, value in alone.weights().items():
        torch.testing.assert_close(parts[0][1][name], value, rtol=tolerance, atol=tolerance)


def resumed_alone(folder: Path) -> tuple[dict[int, list[float]], dict[int, list[float]], bool]:
    whole = individual("none", torch.float32)
    learned(whole, 0, 3)
    checkpoint.save(folder, whole, HERE, "", ROWS, keep=2)
    learned(whole, 3, 3)
    fresh = individual("none", torch.float32)
    checkpoint.restore(checkpoint.find(folder), fresh)
    learned(fresh, 3, 3)
    return kept(whole), kept(fresh), equal(whole.weights(), fresh.weights())


def test_numbers_by_sample_come_back_bit_for_bit(tmp_path):
    whole, fresh, weights = resumed_alone(tmp_path)
    assert repr(whole) == repr(fresh) and len(whole) > 12 and weights


def with_micro_batches(rank: int, kind: str, micro_batch: int | None) -> dict[int, list[float]]:
    engine = individual(kind, torch.float32, micro_batch=micro_batch)
    learned(engine, 0, 3)
    return kept(engine)


@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_numbers_by_sample_change_once_a_step(ranks, kind):
    plain, cached = (ranks(2).run(with_micro_batches, kind, rows) for rows in (None, 2))
    for one, other in zip(plain, cached, strict=True):
        assert one.keys() == other.keys()
        for name, row in one.items():
            assert other[name] == pytest.approx(row, rel=1e-4, abs=1e-5, nan_ok=True)


def test_a_step_that_is_not_taken_leaves_no_numbers():
    engine = individual("none", torch.float32)
    learned(engine, 0, 2)
    before = kept(engine)
    batch = batch_of(3, seed=9)
    batch.views["v0"].data[3] = torch.nan
    assert not engine.step(batch).stepped
    assert repr(kept(engine)) == repr(before)

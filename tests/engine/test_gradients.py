"""Every parameter's gradient on real ranks, under every engine, against one process on the concatenated batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.types import Batch
from tests.engine.small import batch_of, engine_of, optimizer_of, rows_of, task_of

CLIP = 0.05  # well below the first gradient's norm


def weights_after(rank: int, kind: str, k: int, steps: int, changes: dict, batch: Batch, settings: dict) -> dict:
    """What the engine's weights are after some steps of plain descent with a rate of 1 (runs on every rank)."""
    dtype = next(iter(batch.views.values())).data.dtype
    engine = engine_of(kind, lambda collectives: task_of(k, dtype, collectives, **changes), **settings)
    mine = rows_of(batch, rank, engine.world.size)
    for _ in range(steps):
        assert engine.step(mine).stepped
    return engine.weights()


def reference(k: int, steps: int, changes: dict, batch: Batch, clip: float | None = None) -> dict[str, Tensor]:
    """The same descent by hand, in one process on the whole batch, in float64."""
    views = {v: x._replace(data=x.data.double()) for v, x in batch.views.items()}
    task = task_of(k, torch.float64, SingleProcess(), **changes)
    trained = [p for p in task.parameters() if p.requires_grad]
    for _ in range(steps):
        gradients = torch.autograd.grad(task(batch._replace(views=views)).total, trained)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert clip is None or norm > 2 * clip
        with torch.no_grad():
            for p, g in zip(trained, gradients):
                p -= g * (1.0 if clip is None else clip / norm)
    return task.state_dict()


def errors(
    found: dict[str, Tensor], k: int, steps: int, changes: dict, batch: Batch, clip: float | None = None
) -> dict:
    """Per parameter, the error of the change relative to the change; what is frozen must be bit-equal."""
    begin, wanted = reference(k, 0, changes, batch), reference(k, steps, changes, batch, clip)
    assert found.keys() == wanted.keys()
    still = {name for name in wanted if torch.equal(begin[name], wanted[name])}
    assert all(torch.equal(found[name].double(), begin[name].float().double()) for name in still), still
    return {
        name: float((found[name].double() - wanted[name]).norm() / (wanted[name] - begin[name]).norm().clamp_min(1e-3))
        for name in wanted
    }


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_ddp_gradient_is_that_of_one_process(ranks, size, k):
    batch = batch_of(k, torch.float64)
    found = ranks(size).run(weights_after, "ddp", k, 1, {}, batch, {})[0]
    off = errors(found, k, 1, {}, batch)
    assert max(off.values()) < 1e-10, off
    assert any("temperature" in name for name in off)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("size", [2, 4])
def test_zero_gradient_is_that_of_one_process(ranks, size, kind, k):
    batch = batch_of(k)
    off = errors(ranks(size).run(weights_after, kind, k, 1, {}, batch, {})[0], k, 1, {}, batch)
    assert max(off.values()) < 1e-5, off


ENGINES = [("ddp", torch.float64, 1e-10), *((f"zero{stage}", torch.float32, 2e-5) for stage in (1, 2, 3))]


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), ENGINES)
def test_weights_after_three_steps(ranks, kind, dtype, tolerance):
    batch = batch_of(3, dtype)
    off = errors(ranks(2).run(weights_after, kind, 3, 3, {}, batch, {})[0], 3, 3, {}, batch)
    assert max(off.values()) < tolerance, off


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero2", "zero3"])
def test_the_clipped_gradient_is_the_one_clipped_by_hand(ranks, kind):
    batch = batch_of(2)
    off = errors(ranks(2).run(weights_after, kind, 2, 2, {}, batch, {"clip": CLIP})[0], 2, 2, {}, batch, CLIP)
    assert max(off.values()) < 2e-5, off


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero2", "zero3"])
def test_without_clip_a_large_gradient_passes_whole(ranks, kind):
    """DeepSpeed clips at a norm of 1 unless it is told not to."""
    batch = batch_of(2)
    found = ranks(2).run(norm_and_change, kind, batch)[0]
    assert found[0] > 20 and found[1] == pytest.approx(found[0], rel=1e-4)


def norm_and_change(rank: int, kind: str, batch: Batch) -> tuple[float, float]:
    """The gradient's norm, and how far a step of rate 1 went."""
    engine = engine_of(kind, lambda collectives: task_of(2, torch.float32, collectives, Scaled(100.0)))
    before = engine.weights()
    done = engine.step(rows_of(batch, rank, 2))
    after = engine.weights()
    moved = [(after[name] - before[name]).flatten() for name in before]
    return done.norm, float(torch.cat(moved).norm()) if moved else 0.0


class Scaled(torch.nn.Module):
    """A steep objective."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, local, gathered):
        from mvpretrain.types import Losses

        return Losses(self.factor * (local.z["v0"] - local.z["v1"]).square().sum(dim=1).mean(), {})


@pytest.mark.parametrize(("kind", "tolerance"), [("ddp", 1e-10), ("zero2", 1e-5), ("zero3", 1e-5)])
@pytest.mark.parametrize("missing", ["on one rank", "everywhere"])
def test_a_view_that_no_row_of_a_rank_has(ranks, kind, tolerance, missing):
    dtype = torch.float64 if kind == "ddp" else torch.float32
    batch = batch_of(3, dtype)
    batch.present["v2"][0 if missing == "everywhere" else 9 :] = False  # rank 1 holds the rows from 9 on
    off = errors(ranks(2).run(weights_after, kind, 3, 1, {}, batch, {})[0], 3, 1, {}, batch)
    assert max(off.values()) < tolerance, off


TOWERS = {
    "frozen": {"freeze": True},
    "its last block trains": {"freeze": True, "train_blocks": 1, "encoder": {"depth": 3}},
    "recomputed": {"checkpoint_activations": True, "encoder": {"depth": 2}},
}


@pytest.mark.parametrize(("kind", "tolerance"), [("ddp", 1e-10), ("zero2", 1e-5), ("zero3", 1e-5)])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_are_frozen_or_recomputed(ranks, kind, tolerance, name):
    """Two views share the first tower here as everywhere."""
    batch = batch_of(3, torch.float64 if kind == "ddp" else torch.float32)
    plain = {key: value for key, value in TOWERS[name].items() if key != "checkpoint_activations"}
    off = errors(ranks(2).run(weights_after, kind, 3, 2, TOWERS[name], batch, {})[0], 3, 2, plain, batch)
    assert max(off.values()) < 2 * tolerance, off


def lamb_weights(rank: int, kind: str, batch: Batch) -> dict[str, Tensor]:
    engine = engine_of(kind, None, partial(optimizer_of, kind="lamb", lr=0.02))
    for _ in range(3):
        engine.step(rows_of(batch, rank, engine.world.size))
    return engine.weights()


@pytest.mark.parametrize("kind", ["ddp", "zero0"])
def test_lamb_on_ranks_is_lamb_in_one_process(ranks, kind):
    found, wanted = ranks(2).run(lamb_weights, kind, batch_of(3))[0], lamb_weights(0, "none", batch_of(3))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lamb", "lars", "muon"])
def test_optimisers_of_whole_layers_are_refused_where_layers_are_cut(ranks, kind):
    """ZeRO would give LAMB's trust ratio to pieces, and the result would depend on the number of ranks."""
    for text in ranks(2).run(refusal, "zero2", kind):
        assert "scales by whole layers" in text and "engine.kind=ddp or zero0" in text


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion", "nadamw"])
def test_optimisers_of_single_numbers_are_not_refused(ranks, kind):
    assert ranks(2).run(refusal, "zero1", kind) == ["", ""]


def refusal(rank: int, engine: str, kind: str) -> str:
    try:
        engine_of(engine, None, partial(optimizer_of, kind=kind))
    except ValueError as error:
        return str(error)
    return ""

"""Micro-batches in two passes: the plain step's gradient, random numbers, statistics and messages, in less memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpretrain.engine import gradcache
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.model.heads import HeadConfig
from mvpretrain.types import Embeddings, Losses, View
from tests.engine.small import DIM, ROWS, batch_of, engine_of, optimizer_of, rows_of, task_of
from tests.engine.test_gradients import CLIP, TOWERS, errors, weights_after

ZERO = ("zero0", "zero1", "zero2", "zero3")
PRECISE = [("ddp", torch.float64, 1e-10), *((kind, torch.float32, 2e-5) for kind in ZERO)]


class Critic(nn.Module):
    """An objective with a module of its own to train, a count of its calls, and noise; a mean over present rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.zeros(1))
        self.noise = 0.0

    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        self.calls += 1
        here, there = local.present["v0"], gathered.present["v0"]
        scores = self.bilinear(local.z["v0"]) @ gathered.z["v1"].T
        rows = scores.masked_fill(~there, -torch.inf).logsumexp(dim=1)
        rows = rows + (local.z["v0"] - local.z["v2"]).square().sum(dim=1)
        total = rows.masked_fill(~here, 0).sum() / there.sum() * (len(gathered.ids) / len(local.ids))
        return Losses(total * (1 + self.noise * torch.rand(())) if self.noise else total, {})


# Rows a rank are 9 and 3, or 5, 1, 4 and 2: ranks run out of rows before the last micro-batch, some after the first.
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), PRECISE)
@pytest.mark.parametrize(("size", "k", "micro_batch"), [(2, 3, 1), (4, 2, 2)])
def test_the_gradient_is_that_of_the_plain_step(ranks, kind, dtype, tolerance, size, k, micro_batch):
    batch = batch_of(k, dtype)
    found = ranks(size).run(weights_after, kind, k, 2, {}, batch, {"micro_batch": micro_batch})[0]
    off = errors(found, k, 2, {}, batch)
    assert max(off.values()) < tolerance and any("temperature" in name for name in off), off


@pytest.mark.parametrize("micro_batch", [1, 5, ROWS - 1, ROWS, 100])
def test_one_process(micro_batch):
    batch = batch_of(3, torch.float64)
    off = errors(weights_after(0, "none", 3, 2, {}, batch, {"micro_batch": micro_batch}), 3, 2, {}, batch)
    assert max(off.values()) < 1e-10, off


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), PRECISE)
def test_objectives_that_train_modules_of_their_own(ranks, kind, dtype, tolerance):
    batch, changes = batch_of(3, dtype), {"objective": Critic}
    off = errors(ranks(2).run(weights_after, kind, 3, 2, changes, batch, {"micro_batch": 2})[0], 3, 2, changes, batch)
    assert max(off.values()) < tolerance and any("bilinear" in name for name in off), off


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero2", "zero3"])
def test_the_clipped_gradient_is_the_one_clipped_by_hand(ranks, kind):
    batch, settings = batch_of(2), {"micro_batch": 2, "clip": CLIP}
    off = errors(ranks(2).run(weights_after, kind, 2, 2, {}, batch, settings)[0], 2, 2, {}, batch, CLIP)
    assert max(off.values()) < 2e-5, off


@pytest.mark.parametrize(("kind", "tolerance"), [("ddp", 1e-10), ("zero2", 2e-5), ("zero3", 2e-5)])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_are_frozen_or_recomputed(ranks, kind, tolerance, name):
    batch = batch_of(3, torch.float64 if kind == "ddp" else torch.float32)
    plain = {key: value for key, value in TOWERS[name].items() if key != "checkpoint_activations"}
    found = ranks(2).run(weights_after, kind, 3, 2, TOWERS[name], batch, {"micro_batch": 2})[0]
    off = errors(found, 3, 2, plain, batch)
    assert max(off.values()) < tolerance, off


class Attending(nn.Module):
    """An encoder with torch's attention, which reads the weights of its last projection without calling it."""

    def __init__(self, width: int, **_: int) -> None:
        super().__init__()
        self.dim, self.lift, self.attention = width, nn.Linear(1, width), nn.MultiheadAttention(width, 2)

    def forward(self, view: View) -> Tensor:
        x = self.lift(view.data.T[:, :, None])
        return self.attention(x, x, x, need_weights=False)[0].mean(dim=0)


def test_attention_of_torch_under_zero_3(ranks):
    batch, changes = batch_of(3), {"encoder": {"kind": "tests.engine.test_gradcache:Attending"}}
    found = ranks(2).run(weights_after, "zero3", 3, 2, changes, batch, {"micro_batch": 2})[0]
    off = errors(found, 3, 2, changes, batch)
    assert max(off.values()) < 2e-5 and any("out_proj" in name for name in off), off


@pytest.mark.parametrize(("kind", "tolerance"), [("ddp", 1e-10), ("zero2", 1e-5), ("zero3", 1e-5)])
@pytest.mark.parametrize("begin", [0, 9])
def test_a_view_that_no_row_of_a_rank_has(ranks, kind, tolerance, begin):
    batch = batch_of(3, torch.float64 if kind == "ddp" else torch.float32)
    batch.present["v2"][begin:] = False
    found = ranks(2).run(weights_after, kind, 3, 1, {}, batch, {"micro_batch": 2})[0]
    off = errors(found, 3, 1, {}, batch)
    assert max(off.values()) < tolerance, off


BARE = {"freeze": True, "encoder": {"width": DIM}, "head": HeadConfig(layers=0)}


@pytest.mark.parametrize(("kind", "tolerance"), [("ddp", 1e-10), ("zero2", 1e-5), ("zero3", 1e-5)])
def test_only_the_objective_trains(ranks, kind, tolerance):
    batch = batch_of(3, torch.float64 if kind == "ddp" else torch.float32)
    found = ranks(2).run(weights_after, kind, 3, 2, BARE, batch, {"micro_batch": 2})[0]
    off = errors(found, 3, 2, BARE, batch)
    assert max(off.values()) < tolerance and off["objective.log_temperature"] > 0, off


class Spare(Critic):
    """With a parameter that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


def spared(rank: int, kind: str) -> tuple[bool, bool]:
    engine = engine_of(kind, lambda collectives: task_of(3, torch.float32, collectives, Spare), micro_batch=2)
    stepped = [engine.step(rows_of(batch_of(3), rank, 2)).stepped for _ in range(3)]
    return all(stepped), bool(torch.equal(engine.weights().get("objective.spare", torch.ones(3)), torch.ones(3)))


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero3"])
def test_a_parameter_without_a_gradient_neither_hangs_nor_moves(ranks, kind):
    assert ranks(2).run(spared, kind) == [(True, True)] * 2


def noisy_step(rank: int, kind: str, micro_batch: int) -> dict[str, Any]:
    """One step with dropout, batch statistics and a noisy objective, and the same by hand: chunks in one graph."""
    changes = {"encoder": {"dropout": 0.4}, "head": HeadConfig(layers=2, norm="batch")}

    def made(collectives: Any) -> Any:
        task = task_of(3, torch.float64, collectives, Critic, **changes)
        task.get_submodule("objective").noise = 0.5  # type: ignore[assignment]
        return task

    engine = engine_of(kind, made, micro_batch=micro_batch)
    batch = rows_of(batch_of(3, torch.float64), rank, engine.world.size)
    torch.manual_seed(5 + rank)
    assert engine.step(batch).stepped
    left, task = torch.get_rng_state(), made(engine.world.collectives)
    torch.manual_seed(5 + rank)
    count = -(-len(batch.ids) // micro_batch)
    parts = [batch.rows(b) for b in pieces(len(batch.ids), count)]
    tables = [task.train().encode(piece) for piece in parts]
    joined = {v: torch.cat([t.z[v] for t in tables]) for v in tables[0].z}
    trained = list(task.parameters())
    gradients = torch.autograd.grad(task.score(Embeddings(joined, *batch[1:])).total, trained)
    gradients = [engine.world.collectives.sum(g) / engine.world.size for g in gradients]
    with torch.no_grad():
        for p, g in zip(trained, gradients):
            p -= g
    found = engine.task.state_dict()
    off = {name: float((found[name] - value).abs().max()) for name, value in task.state_dict().items()}
    return {"off": off, "generator": torch.equal(left, torch.get_rng_state()), "calls": float(found["objective.calls"])}


def pieces(rows: int, count: int) -> list[slice]:
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def test_random_numbers_and_statistics_are_those_of_one_pass():
    found = noisy_step(0, "none", 5)
    assert max(found["off"].values()) < 1e-12 and found["generator"] and found["calls"] == 1, found


def test_random_numbers_and_statistics_on_ranks(ranks):
    """Rank 1 repeats its rows: nothing of that may be left."""
    for found in ranks(2).run(noisy_step, "ddp", 3):
        assert max(found["off"].values()) < 1e-12 and found["generator"] and found["calls"] == 1, found


def counted(rank: int, kind: str, micro_batch: int | None) -> float:
    """The objective's count after two steps, begun at another number on each rank."""
    engine = engine_of(
        kind, lambda collectives: task_of(3, torch.float32, collectives, Critic), micro_batch=micro_batch
    )
    calls = engine.task.get_buffer("objective.calls")
    calls += 100 * rank
    for _ in range(2):
        engine.step(rows_of(batch_of(3), rank, 2))
    return float(calls)


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero3"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_rank_keeps_the_state_of_its_own_objective(ranks, kind, micro_batch):
    assert ranks(2).run(counted, kind, micro_batch) == [2, 102]


def half(rank: int, kind: str, settings: dict) -> list[dict[str, Tensor]]:
    """The first gradient, plain and with micro-batches, and the precisions that modules computed in."""
    found = []
    for changes in ({}, settings):
        inside: list[bool] = []
        engine = engine_of(kind, None, None, **{"precision": "bf16", **changes})
        linear = next(m for m in engine.task.modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda *call, seen=inside: seen.append(call[2].dtype == torch.bfloat16))
        before = engine.weights()
        engine.step(rows_of(batch_of(3), rank, engine.world.size))
        after = engine.weights()
        found.append({name: after[name] - before[name] for name in before} | {"inside": torch.tensor(inside)})
    return found


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero2", "zero3"])
def test_bf16_is_the_plain_bf16_within_rounding(ranks, kind):
    plain, cached = ranks(2).run(half, kind, {"micro_batch": 2})[0]
    assert cached.pop("inside").all() and plain.pop("inside").all()
    for name, change in plain.items():
        assert (cached[name] - change).norm() < 0.02 * change.norm() + 1e-4, name


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_first_pass_in_bf16_costs_rounding_only(ranks, kind):
    settings = {"precision": "fp32", "micro_batch": 3, "first_pass": "bf16"}
    _, cached = ranks(2).run(half, kind, settings)[0]
    exact = ranks(2).run(half, kind, settings | {"first_pass": "same"})[0][1]
    assert cached.pop("inside").tolist() == [True] * 3 + [False] * 3 and not exact.pop("inside").any()
    off = {name: float((cached[name] - g).norm() / g.norm().clamp_min(1e-3)) for name, g in exact.items()}
    assert 0 < max(off.values()) < 0.1, off


def offloaded(rank: int, kind: str, micro_batch: int | None) -> list[float]:
    engine = engine_of(kind, None, optimizer_of, offload=True, clip=1.0, micro_batch=micro_batch)
    return [engine.step(rows_of(batch_of(3), rank, 2)).loss for _ in range(3)]


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_offload(ranks, kind):
    plain, cached = (ranks(2).run(offloaded, kind, rows, timeout=30)[0] for rows in (None, 2))
    assert cached == pytest.approx(plain, rel=1e-5)


def reductions(rank: int, kind: str, micro_batch: int | None) -> int:
    """Messages of the third step that reduce something over ranks."""
    engine = engine_of(kind, None, optimizer_of, micro_batch=micro_batch)
    mine = rows_of(batch_of(3), rank, 2)
    for _ in range(2):
        engine.step(mine)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        engine.step(mine)
    return sum(e.count for e in profiler.key_averages() if e.key.startswith("c10d::") and "reduce" in e.key)


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero1", "zero2"])
def test_gradients_are_reduced_once_a_step(ranks, kind):
    plain, cached = (ranks(2).run(reductions, kind, rows)[0] for rows in (None, 2))
    assert cached == plain + 1  # the number of micro-batches


class Saved:
    """Counts the bytes that autograd keeps at a time, parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.most = 0

    def pack(self, x: Tensor) -> Any:
        return _Kept(self, x)

    def unpack(self, kept: Any) -> Tensor:
        return kept.x


class _Kept:
    def __init__(self, book: Saved, x: Tensor):
        self.book, self.x = book, x
        self.bytes = 0 if x.untyped_storage().data_ptr() in book.own else x.nbytes
        book.now += self.bytes
        book.most = max(book.most, book.now)

    def __del__(self) -> None:
        self.book.now -= self.bytes


def test_one_micro_batch_is_kept_at_a_time():
    kept = {}
    for micro_batch in (None, 1, 2):
        made = partial(task_of, 3, torch.float32, objective=Critic, encoder={"depth": 8, "width": 64})
        engine = engine_of("none", made, micro_batch=micro_batch)
        book = Saved(engine.task)
        with torch.autograd.graph.saved_tensors_hooks(book.pack, book.unpack):
            engine.step(batch_of(3))
        kept[micro_batch] = book.most
    assert kept[1] < kept[None] / 10 and kept[2] < kept[None] / 5, kept


def test_micro_batches_share_the_memory_of_the_batch():
    batch = batch_of(3)
    batch.views["v0"] = batch.views["v0"]._replace(mask=torch.ones(ROWS, 6, dtype=torch.bool))
    engine = engine_of("none", micro_batch=5)
    found = gradcache.split(engine, batch)
    assert found is not None and [len(b.ids) for b in found.batches] == [4, 4, 4] and found.own == 3
    for i, piece in enumerate(found.batches):
        for v, view in piece.views.items():
            assert view.data.data_ptr() == batch.views[v].data[4 * i].data_ptr()
        mask = batch.views["v0"].mask
        assert mask is not None and piece.views["v0"].mask is not None
        assert piece.views["v0"].mask.data_ptr() == mask[4 * i].data_ptr()
    assert gradcache.split(engine_of("none", micro_batch=ROWS), batch) is None
    assert gradcache.split(engine_of("none"), batch) is None


def with_nothing(rank: int, kind: str) -> list[float]:
    """One rank brings no row at all."""
    engine = engine_of(kind, None, optimizer_of, micro_batch=2)
    batch = batch_of(3)
    mine = batch.rows(slice(ROWS if rank == 0 else 0))
    return [engine.step(mine).loss for _ in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_rank_without_rows_takes_part(ranks, kind):
    engine = engine_of("none", None, optimizer_of)
    wanted = [engine.step(batch_of(3)).loss for _ in range(2)]
    assert ranks(2).run(with_nothing, kind) == [pytest.approx(wanted, abs=1e-5)] * 2


def test_the_breakdown_has_both_passes():
    engine = engine_of("none", micro_batch=2)
    for _ in range(3):
        engine.step(batch_of(3))
    assert engine.phase_timer.count == 3
    figures = engine.phase_timer.figures()
    assert all(figures[phase] > 0 for phase in ("encode", "gather", "objective", "backward", "optimizer"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"micro_batch": 0}, "greater than or equal to 1"),
        ({"micro_batch": 2.5}, "integer"),
        ({"micro_batch": 4, "first_pass": "fp8"}, "'same' or 'bf16'"),
        ({"first_pass": "bf16"}, "set micro_batch=ROWS, or first_pass=same"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**settings)


def too_old(rank: int) -> str:
    """A DeepSpeed that reduces after every backward pass."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    kept = DeepSpeedEngine.coalesce_grad_reduction
    del DeepSpeedEngine.coalesce_grad_reduction
    try:
        engine_of("zero2", micro_batch=2)
    except ValueError as error:
        return str(error)
    finally:
        DeepSpeedEngine.coalesce_grad_reduction = kept
    return ""


def test_a_deepspeed_that_is_too_old_is_refused(ranks):
    for text in ranks(2).run(too_old):
        assert "engine.micro_batch=2 needs a DeepSpeed" in text and "engine.kind=ddp" in text

"""Every parameter's gradient on real ranks, under every engine, against one process on the concatenated batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mvpretrain import objectives
from mvpretrain.exchange import Alone
from mvpretrain.task import HeadConfig, Task, TowerConfig
from mvpretrain.types import Batch, View

ROWS, WIDTH, DIM = 12, 6, 5
# Rows per rank; None of them equal, and one rank with hardly any.
SPLITS = {1: [12], 2: [9, 3], 4: [5, 1, 4, 2]}


def batch_of(k: int, dtype: torch.dtype) -> Batch:
    """k views of 12 samples: two share an id, and the last view is missing from some rows."""
    make = torch.Generator().manual_seed(k)
    names = [f"v{i}" for i in range(k)]
    views = {v: View(torch.randn(ROWS, WIDTH, generator=make).to(dtype)) for v in names}
    ids = torch.arange(ROWS) + 2**60
    ids[7] = ids[2]
    present = {v: torch.ones(ROWS, dtype=torch.bool) for v in names}
    present[names[-1]][[0, 4, 5, 10]] = False
    return Batch(views, ids, present, torch.full((ROWS,), -1))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(
        {v: View(x.data[part]) for v, x in batch.views.items()},
        batch.ids[part],
        {v: p[part] for v, p in batch.present.items()},
        batch.labels[part],
    )


def task_of(k: int, dtype: torch.dtype, exchange) -> Task:
    """Two views share a tower; the others have their own."""
    torch.manual_seed(0)
    tower = TowerConfig(
        encoder={"kind": "mlp", "input": WIDTH, "width": 8, "depth": 1},  # type: ignore[arg-type]
        head=HeadConfig(layers=2),
    )
    views = {f"v{i}": "t0" if i < 2 else f"t{i}" for i in range(k)}
    objective = objectives.build({"kind": "infonce", "temperature": {"init": 0.2, "per_pair": True}}, list(views))
    return Task(views, dict.fromkeys(sorted(set(views.values())), tower), DIM, objective, exchange).to(dtype)


def weights_after(rank: int, kind: str, dtype: torch.dtype, k: int, steps: int) -> dict[str, Tensor]:
    """What the engine's weights are after some steps of plain descent with a rate of 1 (runs on every rank)."""
    from mvpretrain.engine import start, wrap
    from mvpretrain.recipe import EngineConfig

    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if kind == "zero3" else {}
    config = EngineConfig(kind=kind, device="cpu", clip=None, options=options)  # type: ignore[arg-type]
    world = start(config)
    task = task_of(k, dtype, world.exchange)
    optimizer = torch.optim.SGD(task.parameters(), lr=1.0)
    engine = wrap(world, task, optimizer, config, batch=ROWS)
    ends = list(itertools.accumulate(SPLITS[world.size], initial=0))
    batch = rows_of(batch_of(k, dtype), ends[rank], ends[rank + 1])
    for _ in range(steps):
        assert engine.step(batch).stepped
    return engine.weights()


def reference(dtype: torch.dtype, k: int, steps: int) -> dict[str, Tensor]:
    """The same descent by hand in one process on the whole batch."""
    task, batch = task_of(k, dtype, Alone()), batch_of(k, dtype)
    for _ in range(steps):
        task.zero_grad()
        task(batch).total.backward()
        with torch.no_grad():
            for p in task.parameters():
                assert p.grad is not None
                p -= p.grad
    return task.state_dict()


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor], begin: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter, the error of the change relative to the change."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name] - wanted[name]).norm() / (wanted[name] - begin[name]).norm().clamp_min(1e-3))
        for name in wanted
    }


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_ddp_gradient_is_that_of_one_process(ranks, size, k):
    found = ranks(size).run(weights_after, "ddp", torch.float64, k, 1)[0]
    begin, wanted = reference(torch.float64, k, 0), reference(torch.float64, k, 1)
    errors = relative(found, wanted, begin)
    assert max(errors.values()) < 1e-10, errors
    assert any("temperature" in name for name in errors)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("size", [2, 4])
def test_zero_gradient_is_that_of_one_process(ranks, size, kind, k):
    found = ranks(size).run(weights_after, kind, torch.float32, k, 1)[0]
    begin, wanted = reference(torch.float64, k, 0), reference(torch.float64, k, 1)
    errors = relative({n: w.double() for n, w in found.items()}, wanted, begin)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("ddp", torch.float64, 1e-10), *((f"zero{s}", torch.float32, 2e-5) for s in (1, 2, 3))],
)
def test_weights_after_three_steps(ranks, kind, dtype, tolerance):
    found = ranks(2).run(weights_after, kind, dtype, 3, 3)[0]
    begin, wanted = reference(torch.float64, 3, 0), reference(torch.float64, 3, 3)
    errors = relative({n: w.double() for n, w in found.items()}, wanted, begin)
    assert max(errors.values()) < tolerance, errors

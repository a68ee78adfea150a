"""The teacher's weights and its queue under every engine, against averages and past rows kept by hand in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.model.heads import HeadConfig
from mvpretrain.model.task import Task
from mvpretrain.model.teacher import TeacherConfig
from mvpretrain.types import Batch
from tests.engine.small import ROWS, batch_of, engine_of, held, optimizer_of, rows_of, task_of
from tests.engine.test_nonfinite import Breaking

STEPS, MOMENTUM = 3, 0.7
PAIRS = (("v0", "v1@teacher"), ("v2", "v1@teacher"), ("v0", "v2@teacher"), ("v0", "v2"))
PERSIST = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}  # some are held whole, some in pieces


def batches(dtype: torch.dtype) -> list[Batch]:
    """Other rows at each step, some of whose ids the queue still holds."""
    drawn = [batch_of(3, dtype, seed=i) for i in range(STEPS)]
    return [batch._replace(ids=batch.ids + 5 * i) for i, batch in enumerate(drawn)]


def settings(queue: int, table: str = "gather") -> dict[str, Any]:
    """An objective between students and teacher, and a teacher of two views."""
    objective = {"kind": "infonce", "pairs": PAIRS, "temperature": {"init": 0.2, "max": 100.0}, "table": table}
    return {"objective": objective, "teacher": TeacherConfig(momentum=MOMENTUM, views=("v1", "v2"), queue=queue)}


def infonce(u: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], log_tau: Tensor) -> Tensor:
    """Two tables of (rows, ids) against each other, in both directions, by the formula."""
    both = []
    for (a, own), (c, others) in ((u, v), (v, u)):
        scores, same = a @ c.T / log_tau.exp(), own[:, None] == others
        some = same.any(dim=1)
        losses = scores.logsumexp(dim=1) - (scores * same).sum(dim=1) / same.sum(dim=1).clamp_min(1)
        both.append(losses[some].mean())
    return (both[0] + both[1]) / 2


def by_hand(queue: int) -> dict[str, Tensor]:
    """Weights of students and teachers, and the queue, after some steps of plain descent on whole batches."""
    task = task_of(3, torch.float64, SingleProcess(), **settings(0))
    trained = [p for p in task.parameters() if p.requires_grad]
    towers = {"v0": "t0", "v1": "t0", "v2": "t2"}
    past: list[dict[str, Any]] = []
    for batch in batches(torch.float64):
        rows = {v: normalize(task.towers[t](batch.views[v]), dim=1) for v, t in towers.items()}
        with torch.no_grad():
            teacher_rows = {v: normalize(task.teacher.towers[towers[v]](batch.views[v]), dim=1) for v in ("v1", "v2")}
        columns = {v: (z[batch.present[v]], batch.ids[batch.present[v]]) for v, z in rows.items()}
        for v, z in teacher_rows.items():
            kept = [x for x in past if x["present"][v]]
            older = torch.stack([x[v] for x in kept]) if kept else z[:0]
            ids = torch.tensor([x["id"] for x in kept], dtype=torch.int64)
            here = batch.present[v]
            columns[f"{v}@teacher"] = torch.cat([older, z[here]]), torch.cat([ids, batch.ids[here]])
        log_tau = task.get_parameter("objective.log_temperature")
        loss = torch.stack([infonce(columns[u], columns[v], log_tau) for u, v in PAIRS]).mean()
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for p, g in zip(trained, gradients):
                p -= g
        for name, p in task.teacher.towers.named_parameters():
            p.copy_(MOMENTUM * p + (1 - MOMENTUM) * task.towers.get_parameter(name).detach())
        for i in range(ROWS):
            present = {v: bool(batch.present[v][i]) for v in teacher_rows}
            past.append({"id": int(batch.ids[i]), "present": present, **{v: teacher_rows[v][i] for v in teacher_rows}})
        past = past[-queue:] if queue else []
    return {k: v.detach() for k, v in task.state_dict().items()} | listed(past, queue)


def listed(past: list[dict[str, Any]], queue: int) -> dict[str, Tensor]:
    if not queue:
        return {}
    empty = queue - len(past)
    z = torch.zeros(2, queue, len(past[0]["v1"]), dtype=torch.float64)
    z[:, empty:] = torch.stack([torch.stack([row[v] for row in past]) for v in ("v1", "v2")])
    present = [[False] * empty + [row["present"][v] for row in past] for v in ("v1", "v2")]
    ids = torch.tensor([-1] * empty + [row["id"] for row in past])
    queued = {"z": z, "present": torch.tensor(present), "ids": ids, "labels": torch.full_like(ids, -1)}
    return {f"teacher.queue.{name}": value for name, value in queued.items()}


def teacher_rows(rank: int, kind: str, dtype: torch.dtype, changes: dict, **options: Any) -> dict[str, Tensor]:
    """What an engine has after the same steps; the queue must be the same on every rank."""
    engine = engine_of(kind, lambda collectives: task_of(3, dtype, collectives, **changes), **options)
    for batch in batches(dtype):
        assert engine.step(rows_of(batch, rank, engine.world.size)).stepped
    queue = engine.task.teacher.queue
    if queue is not None:
        spread = engine.world.collectives.maximum(queue.z) + engine.world.collectives.maximum(-queue.z)
        assert not spread.any()
    return engine.weights()


def assert_as_by_hand(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    begin = task_of(3, torch.float64, SingleProcess(), **settings(0)).state_dict()
    for name, value in wanted.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        moved = float((value - begin[name]).norm()) if name in begin else float(value.norm())
        assert moved > 1e-3, name
        assert float((found[name].double() - value).norm()) <= tolerance * max(moved, 1e-3), name


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("queue", [0, 8, 16, 60])
def test_one_process_is_as_by_hand(queue, micro_batch):
    """Queues shorter than a batch, longer than one, and not filled."""
    found = teacher_rows(0, "none", torch.float64, settings(queue), micro_batch=micro_batch)
    assert_as_by_hand(found, by_hand(queue), 1e-10)


@pytest.mark.parametrize(("table", "micro_batch"), [("gather", None), ("gather", 2), ("ring", None)])
@pytest.mark.parametrize("size", [2, 4])
def test_ddp_is_as_by_hand(ranks, size, table, micro_batch):
    for queue in (8, 16) if size == 2 else (16,):
        found = ranks(size).run(
            partial(teacher_rows, micro_batch=micro_batch), "ddp", torch.float64, settings(queue, table)
        )[0]
        assert_as_by_hand(found, by_hand(queue), 1e-10)


ZERO = [("zero0", {}), ("zero1", {}), ("zero2", {}), ("zero3", {}), ("zero3", PERSIST)]


@pytest.mark.parametrize(("kind", "options"), ZERO, ids=lambda x: x if isinstance(x, str) else "whole" if x else "")
@pytest.mark.parametrize(("size", "micro_batch"), [(2, None), (4, 2)])
def test_zero_is_as_by_hand(ranks, size, kind, options, micro_batch):
    run = partial(teacher_rows, micro_batch=micro_batch, options=options)
    assert_as_by_hand(ranks(size).run(run, kind, torch.float32, settings(16))[0], by_hand(16), 1e-5)


def noisy(collectives: Any, objective: Any = None) -> Task:
    """Dropout and batch statistics in both sets of towers."""
    changes = {"encoder": {"dropout": 0.3}, "head": HeadConfig(layers=2, norm="batch")}
    return task_of(3, torch.float32, collectives, objective, TeacherConfig(momentum=0.5, queue=8), **changes)


def spoiled(rank: int, kind: str, micro_batch: int | None) -> tuple[bool, bool, bool]:
    """(a step on rows that are not numbers is skipped, changes nothing, and the next one is as if it had not been)."""
    lost, engine = batch_of(3, seed=2), engine_of(kind, noisy, optimizer_of, micro_batch=micro_batch)
    lost.views["v0"].data.fill_(torch.nan)
    engine.step(rows_of(batch_of(3), rank, engine.world.size))
    before = held(engine)
    skipped = not engine.step(rows_of(lost, rank, engine.world.size)).stepped
    same, queue = before == held(engine), engine.task.teacher.queue
    engine.step(rows_of(batch_of(3), rank, engine.world.size))
    return skipped, same, bool(queue.z.isfinite().all()) and before != held(engine)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero3"])
def test_a_step_that_is_skipped_leaves_teacher_and_queue(ranks, kind, micro_batch):
    assert ranks(2).run(spoiled, kind, micro_batch) == [(True, True, True)] * 2


@pytest.mark.parametrize("breaks", ["value", "gradient"])
def test_the_teacher_does_not_follow_where_nobody_went(breaks):
    objective = Breaking(1)
    engine = engine_of("none", partial(noisy, objective=objective), optimizer_of)
    engine.step(batch_of(3))
    before, objective.breaks = held(engine), breaks
    assert not engine.step(batch_of(3)).stepped and held(engine) == before


def statistics(rank: int, kind: str, micro_batch: int | None) -> tuple[int, bool]:
    """(batches that the teacher's norm has seen in a step, whether its statistics are those of its own rows)."""
    engine = engine_of(kind, noisy, optimizer_of, micro_batch=micro_batch)
    engine.step(rows_of(batch_of(3), rank, engine.world.size))
    own, student = (x.state_dict() for x in (engine.task.teacher.towers, engine.task.towers))
    (count, *_), mean = [v for k, v in own.items() if "batches" in k], "t0.head.1.running_mean"
    return int(count), bool(own[mean].any()) and not torch.equal(own[mean], student[mean])


def test_batch_statistics_are_the_teachers_own_and_count_each_row_once(ranks):
    """Rank 1 repeats rows of its one micro-batch, which must leave nothing."""
    assert ranks(2).run(statistics, "ddp", None) == [(1, True)] * 2
    assert ranks(2).run(statistics, "ddp", 3) == [(3, True), (1, True)]

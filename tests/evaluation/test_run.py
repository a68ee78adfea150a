"""Collecting a table over batches and ranks, and what is measured on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from mvpretrain import objectives
from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.evaluation import Evaluated
from mvpretrain.evaluation._collect import collect
from mvpretrain.evaluation._run import evaluate
from mvpretrain.evaluation._settings import EvaluationConfig
from mvpretrain.model.task import Task
from mvpretrain.model.tower import TowerConfig
from mvpretrain.types import Batch, Embeddings, View

HERE = "tests.evaluation.test_run"
CPU = torch.device("cpu")
ROWS, BATCH = 22, 8  # the last of three batches has 6 rows: on two ranks of 4, one of them is padded
VIEWS = ("a", "b", "c")


def task_of(collectives) -> Task:
    torch.manual_seed(0)
    encoder = {"kind": "mlp", "input": 6, "width": 8, "depth": 1}
    tower = TowerConfig.model_validate({"encoder": encoder, "head": {"layers": 2}})
    objective = objectives.build({"kind": "infonce"}, VIEWS, collectives)
    return Task({"a": "one", "b": "one", "c": "two"}, {"one": tower, "two": tower}, 5, objective, collectives).eval()


def samples() -> Batch:
    make = torch.Generator().manual_seed(1)
    views = {v: View(torch.randn(ROWS, 6, generator=make)) for v in VIEWS}
    present = {v: torch.rand(ROWS, generator=make) > 0.2 for v in VIEWS}
    for v in VIEWS:
        present[v][4] = False  # a real sample with nothing in it stays in the table
    return Batch(views, 100 - torch.arange(ROWS), present, torch.arange(ROWS) % 3)


def batches(rank: int, size: int) -> Iterator[Batch]:
    """As a stream gives them: equally many on every rank, the last one filled up with absent rows of id -1."""
    whole, own = samples(), BATCH // size
    for start in range(0, ROWS, BATCH):
        rows = torch.arange(start + rank * own, start + (rank + 1) * own)
        real = rows < ROWS
        rows = rows.clamp_max(ROWS - 1)
        yield Batch(
            {v: View(x.data[rows]) for v, x in whole.views.items()},
            whole.ids[rows].masked_fill(~real, -1),
            {v: p[rows] & real for v, p in whole.present.items()},
            whole.labels[rows].masked_fill(~real, -1),
        )


class Counted:
    """A user's evaluator: batches seen, samples, and a number that all ranks must add to."""

    def __init__(self, views: int = 3):
        self.views, self.batches = views, 0

    def add(self, local: Embeddings, gathered: Embeddings) -> None:
        self.batches += 1

    def __call__(self, evaluated: Evaluated) -> Iterator[tuple[str, float]]:
        assert len(evaluated.table.z) == self.views
        yield "own/batches", self.batches
        yield "own/samples", len(evaluated.table.ids)
        yield "own/ranks", float(evaluated.collectives.sum(torch.ones(())))


def on_rank(rank: int, size: int):
    """(table as plain tensors, metrics) of one rank."""
    collectives = ProcessGroup() if size > 1 else SingleProcess()
    task = task_of(collectives)
    with torch.no_grad():
        table = collect(task, batches(rank, size), collectives, CPU, features=True)
        config = EvaluationConfig.model_validate({"by_label": ("c",), "also": [{"kind": f"{HERE}:Counted"}]})
        return tuple(table), evaluate(task, batches(rank, size), collectives, CPU, config.evaluators())


def test_table_has_every_sample_once_in_order():
    whole = samples()
    task = task_of(SingleProcess())
    with torch.no_grad():
        table = collect(task, batches(0, 1), SingleProcess(), CPU, features=True)
        wanted, features = task.encode(whole), task.features(whole)
    assert torch.equal(table.ids, whole.ids) and torch.equal(table.labels, whole.labels)
    for v in VIEWS:
        assert torch.equal(table.present[v], whole.present[v])
        torch.testing.assert_close(table.z[v], wanted.z[v])
        torch.testing.assert_close(table.features[v], features[v])
    with torch.no_grad():
        plain = collect(task, batches(0, 1), SingleProcess(), CPU)
    assert not plain.features
    torch.testing.assert_close(plain.z, table.z)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match=r"no sample to evaluate; check data\.eval"):
        collect(task_of(SingleProcess()), [], SingleProcess(), CPU)


def test_loss_is_the_objective_weighted_by_samples():
    metrics = on_rank(0, 1)[1]
    task = task_of(SingleProcess())
    with torch.no_grad():
        losses = [float(task(batch).total) for batch in batches(0, 1)]
    rows = [int(torch.stack(list(b.present.values())).any(dim=0).sum()) for b in batches(0, 1)]
    assert len(set(rows)) > 1
    assert metrics["val/loss"] == pytest.approx(sum(n * x for n, x in zip(rows, losses)) / sum(rows), rel=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["retrieval/a-c/chance"] > 2 * metrics["retrieval/a-b/chance"]


def test_two_ranks_see_what_one_sees(ranks):
    alone, metrics = on_rank(0, 1)
    for table, found in ranks(2).run(on_rank, 2):
        for ours, wanted in zip(table, alone):
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
        own = {f"own/{name}": value for name, value in (("batches", 3), ("samples", ROWS), ("ranks", 2))}
        assert found == pytest.approx(metrics | own, rel=1e-5, abs=1e-7)


class Failing:
    """Fails, or leaves a figure out, on one rank alone."""

    def __init__(self, collectives: Collectives, how: str):
        self.rank, self.how = collectives.rank, how

    def __call__(self, evaluated: Evaluated) -> Iterator[tuple[str, float]]:
        yield "own/one", 1.0
        if self.rank == 1 and self.how == "raise":
            raise KeyError("no such thing")
        if self.rank == 0 or self.how != "lack":
            yield "val/loss" if self.how == "twice" else "own/two", 2.0


def failing(rank: int, how: str) -> str:
    collectives = ProcessGroup()
    config = EvaluationConfig.model_validate({"also": [{"kind": f"{HERE}:Failing", "how": how}]})
    try:
        with torch.no_grad():
            evaluate(task_of(collectives), batches(rank, 2), collectives, CPU, config.evaluators())
    except (KeyError, ValueError) as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


@pytest.mark.parametrize(("how", "words"), [
    ("raise", ("ValueError evaluator 'tests.evaluation.test_run:Failing' failed on another rank", "KeyError 'no such")),
    ("lack", ("yields 1 figures on one rank and 2 on another",) * 2),
    ("twice", ("yields 'val/loss', which another one has yielded; rename it",) * 2),
])  # fmt: skip
def test_what_goes_wrong_on_one_rank_ends_all_of_them(ranks, how, words):
    for text, wanted in zip(ranks(2).run(failing, how), words, strict=True):
        assert wanted in text


@pytest.mark.parametrize("kinds", [["retrieval"], ["loss"], [f"{HERE}:Counted"] * 2])
def test_a_kind_that_is_there_already_is_refused(kinds):
    with pytest.raises(ValueError, match="would give the same names twice"):
        EvaluationConfig.model_validate({"also": [{"kind": kind} for kind in kinds]})


def test_a_class_whose_objects_cannot_be_called_is_refused():
    config = EvaluationConfig.model_validate({"also": [{"kind": "pathlib:PurePath"}]})
    with pytest.raises(ValueError, match=r"'pathlib:PurePath' cannot be called; give it __call__"):
        evaluate(task_of(SingleProcess()), batches(0, 1), SingleProcess(), CPU, config.evaluators())

"""The teacher as settings and as part of the task: names, refusals, tables, starting weights, memory, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mvpretrain import objectives, recipe
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation import Evaluated
from mvpretrain.evaluation._collect import Table
from mvpretrain.evaluation.loss import MeanLoss
from mvpretrain.export.write import export_run
from mvpretrain.model.queue import Queue
from mvpretrain.model.task import Task
from mvpretrain.model.teacher import TeacherConfig
from mvpretrain.testing.tables import draw, table
from mvpretrain.training import train
from mvpretrain.types import Embeddings, Losses
from tests.engine.small import DIM, ROWS, batch_of, task_of
from tests.runs import make_run, settings

TEACHER = TeacherConfig(momentum=0.75, views=("v1", "v2"), queue=8)
NAMES = ["v0", "v1", "v2", "v1@teacher", "v2@teacher"]


class Watching(torch.nn.Module):
    """An objective that keeps what it was given."""

    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        self.local, self.gathered = local, gathered
        return Losses(sum(z.sum() for z in local.z.values()), {})  # type: ignore[arg-type]


def watched(**changes: Any) -> tuple[Task, Watching]:
    seen = Watching()
    return task_of(3, torch.float32, SingleProcess(), seen, TEACHER, **changes), seen


def test_the_teachers_views_are_more_views_without_a_graph():
    task, seen = watched()
    with torch.no_grad():
        for p in task.teacher.parameters():
            p.mul_(-0.5)
    batch = batch_of(3)
    losses = task.train()(batch)
    table = seen.local
    assert list(table.z) == list(table.present) == NAMES and list(task.encode(batch).z) == NAMES[:3]
    assert len(table.ids) == ROWS + TEACHER.queue and bool((table.ids[ROWS:] == -1).all())
    for name, v in (("v1@teacher", "v1"), ("v2@teacher", "v2")):
        rows = torch.nn.functional.normalize(task.teacher.towers[task.views[v]](batch.views[v]), dim=1)
        torch.testing.assert_close(table.z[name][:ROWS], rows)
        assert torch.equal(table.present[name][:ROWS], batch.present[v]) and not table.z[name].requires_grad
    assert set(losses.parts) == {f"{figure}/{v}" for figure in ("spread", "uniformity") for v in NAMES[:3]}
    assert [name for name, p in task.named_parameters() if p.requires_grad and "teacher" in name] == []


def test_the_queue_comes_after_the_batch_and_grows_in_training_only():
    task, seen = watched()
    task.eval()(batch_of(3))
    task.train()(batch_of(3))
    assert not torch.stack([p[ROWS:] for p in seen.local.present.values()]).any()
    first = seen.local
    task(batch_of(3, seed=1))
    queued = seen.local.rows(slice(ROWS, None))
    assert torch.equal(queued.ids, first.ids[ROWS - 8 : ROWS])
    for v in NAMES:
        teacher_rows = v.endswith("teacher")
        wanted = first.present[v][ROWS - 8 : ROWS] if teacher_rows else torch.zeros(8, dtype=torch.bool)
        assert torch.equal(queued.present[v], wanted)
        assert torch.equal(queued.z[v], first.z[v][ROWS - 8 : ROWS] if teacher_rows else torch.zeros(8, DIM))


def test_rows_without_a_teachers_view_are_not_queued():
    queue, rows = Queue(["view1"], 4, 8, SingleProcess()), table(2)
    queue.push(rows, rows)
    some = rows.present["view1"]
    assert torch.equal(queue.ids, rows.ids[some][-4:]) and torch.equal(queue.z[0], rows.z["view1"][some][-4:])
    assert queue.present.all()


class OneOfTwo(SingleProcess):
    """A rank of two that has nothing to send."""

    size = 2

    def __init__(self, rank: int):
        self.rank = rank


def test_the_gathered_table_is_the_ranks_tables_one_after_another():
    tables = [table(2, seed) for seed in (1, 2)]
    for rank in range(2):
        queue = Queue(["view1"], 6, 8, OneOfTwo(rank))
        queue.push(table(2, seed=3), table(2, seed=3))
        local, gathered = queue.append_queue(tables[rank], Embeddings.cat(tables))
        torch.testing.assert_close(gathered.split(2)[rank], local, rtol=0, atol=0)
        assert torch.equal(local.ids, torch.cat([tables[rank].ids, queue.ids[3 * rank : 3 * rank + 3]]))
        assert not local.present["view0"][-3:].any() and local.present["view1"][-3:].all()


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
def test_it_follows_by_its_momentum(momentum):
    task = task_of(3, torch.float64, SingleProcess(), None, TEACHER.model_copy(update={"momentum": momentum}))
    begin = {name: p.clone() for name, p in task.teacher.towers.named_parameters()}
    assert all(torch.equal(p, task.towers.get_parameter(name)) for name, p in begin.items())
    task.teacher.update_ema(task.towers)
    assert all(torch.equal(p, begin[name]) for name, p in task.teacher.towers.named_parameters())  # not a bit
    with torch.no_grad():
        for i, p in enumerate(task.towers.parameters()):
            p += draw(i, *p.shape)
    task.teacher.update_ema(task.towers)
    for name, p in task.teacher.towers.named_parameters():
        wanted = momentum * begin[name] + (1 - momentum) * task.towers.get_parameter(name)
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", objectives.registry.kinds())
def test_any_objective_takes_them(kind):
    """Two thirds of the rows are a queue's, half filled, in which the students are absent."""
    terms = [{"objective": {"kind": "infonce"}, "views": ["v0", "v1@teacher"]}]
    # What has no default; one head divides any width.
    needed = {"sum": {"terms": terms}, "tempnet": {"dim": DIM}, "amcl": {"dim": DIM, "heads": 1}}
    needed["dbpm"] = {"objective": {"kind": "infonce"}}
    config = {"kind": kind, **needed.get(kind, {})}
    teacher = TeacherConfig(views=("v1",), queue=2 * ROWS)
    task = task_of(2, torch.float64, SingleProcess(), config, teacher).train()
    with torch.no_grad():  # a teacher that is its student spans no volume with it
        for i, p in enumerate(task.teacher.parameters()):
            p += draw(i, *p.shape)
    batch = batch_of(2, torch.float64)._replace(labels=torch.arange(ROWS) % 3)
    task(batch)
    losses = task(batch._replace(ids=batch.ids + ROWS))
    assert set(task.table(batch).z) == {"v0", "v1", "v1@teacher"}
    found = torch.autograd.grad(losses.total, list(task.towers.parameters()), allow_unused=True, materialize_grads=True)
    assert losses.total.isfinite() and all(g.isfinite().all() for g in found) and any(g.any() for g in found)


def test_activations_that_are_recomputed_and_frozen_towers_have_teachers_too():
    task, _ = watched(freeze=True, train_blocks=1, checkpoint_activations=True, encoder={"depth": 2})
    losses = task.train()(batch_of(3))
    losses.total.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    frozen, _ = watched(freeze=True)
    assert not frozen.train().teacher.towers["t0"].encoder.training  # type: ignore[union-attr]


def test_evaluation_holds_students_against_students():
    task = task_of(3, torch.float32, SingleProcess(), None, TEACHER).eval()
    local = task.encode(batch_of(3))
    loss = MeanLoss(task)
    with torch.no_grad():
        for p in task.teacher.parameters():
            p.fill_(torch.nan)
    loss.add(local, local)
    twin = local._replace(
        z=local.z | {f"{v}@teacher": local.z[v] for v in ("v1", "v2")},
        present=local.present | {f"{v}@teacher": local.present[v] for v in ("v1", "v2")},
    )
    seen = Evaluated(task, Table(local.z, {}, *local[1:]), SingleProcess(), torch.device("cpu"))
    assert dict(loss(seen))["val/loss"] == pytest.approx(float(task.objective(twin, twin).total.detach()))


def parsed(folder: Path, **changes: Any) -> recipe.Recipe:
    return recipe.parse(settings(folder, **changes))


@pytest.mark.parametrize(("changes", "words"), [
    ({"teacher": {"views": ["lift"]}}, "unknown view in teacher.views 'lift'; did you mean 'left'?"),
    ({"teacher": {"views": ["left", "left"]}}, "name each view that the teacher embeds once"),
    ({"teacher": {"views": []}}, "name each view that the teacher embeds once"),
    ({"teacher": {"momentum": 1.5}}, "less than or equal to 1"),
    ({"teacher": {"queue": 10}, "engine": {"ranks": 4}, "batch": 8}, "teacher.queue=10 does not divide over 4 ranks"),
    ({"teacher": {}, "objective": {"kind": "infonce", "pairs": [["left", "texs@teacher"]]}}, "mean 'text@teacher'?"),
    ({"objective": {"kind": "infonce", "pairs": [["left", "text@teacher"]]}}, "known: left, right, text"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        parsed(tmp_path, **changes)
    assert words in str(error.value)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="view 'a@teacher' has the name of"):
        TeacherConfig().check(["a", "a@teacher"], None)


class Two(SingleProcess):
    size = 2


def test_a_queue_that_does_not_divide_over_the_ranks_that_came_is_refused():
    with pytest.raises(ValueError, match=r"teacher.queue=7 does not divide over 2 ranks; make it a multiple of 2"):
        task_of(2, torch.float32, Two(), None, TeacherConfig(queue=7))


def test_a_recipe_builds_and_prints_it(tmp_path):
    made = parsed(tmp_path, teacher={"momentum": 0.9, "views": ["text", "left"], "queue": 64})
    assert made.columns() == ["left", "right", "text", "text@teacher", "left@teacher"]
    task = made.task(SingleProcess())
    assert list(task.teacher.towers) == ["text", "both"] and task.teacher.queue.z.shape == (2, 64, 5)  # type: ignore[union-attr]
    assert recipe.parse(made.model_dump(mode="json")) == made


def test_an_export_is_of_the_students(tmp_path):
    run = make_run(tmp_path, teacher={"queue": 8})
    out = export_run(run, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["left", "right", "text"]


def test_weights_to_start_from_bring_their_teacher_or_are_its_beginning(tmp_path):
    made = parsed(tmp_path, teacher={"queue": 8})
    other, path = made.task(SingleProcess()), str(tmp_path / "w.safetensors")
    for value in other.state_dict().values():
        value.fill_(3)
    for kept in ("", "towers"):
        save_file({k: v.clone() for k, v in other.state_dict().items() if k.startswith(kept)}, path)
        task = made.task(SingleProcess())
        with torch.no_grad():
            other.teacher.towers["text"].head[0].weight.fill_(3 if kept else 5)  # type: ignore[index, union-attr]
        train.start_from(task, path)
        for name, value in task.teacher.towers.state_dict().items():
            assert torch.equal(value, torch.full_like(value, 3)), name
        assert task.teacher.queue is not None and bool((task.teacher.queue.ids == -1).all())

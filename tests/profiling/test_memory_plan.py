"""Plans against counting by hand, and against what lives while the real engines step."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from mvpretrain import recipe
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.engine import resolve, start
from mvpretrain.engine.optimizer import optimizer_class
from mvpretrain.profiling import memory_plan
from mvpretrain.profiling.measure import Live
from mvpretrain.profiling.memory_plan import Model, Setting
from mvpretrain.training.train import build_engine
from mvpretrain.types import Batch

CPU = torch.device("cpu")
VALUE: dict[str, Any] = {
    "run": "run",
    "data": {"kind": "synthetic", "samples": 200, "eval_samples": 0, "missing": {"c": 0.3}},
    "views": {
        "a": {"kind": "text", "field": "a", "length": 16, "tower": "both"},
        "b": {"kind": "text", "field": "b", "length": 16, "tower": "both"},
        "c": {"kind": "vector", "field": "c", "dim": 48},
    },
    "towers": {
        "both": {"encoder": {"kind": "transformer", "length": 16, "width": 64, "depth": 3, "heads": 2}},
        "c": {"encoder": {"kind": "mlp", "input": 48, "width": 256, "depth": 2}},
    },
    "objective": {"kind": "infonce"},
    "dim": 32,
    "batch": 96,
    "steps": 3,
    "loader": {"workers": 2, "prefetch": 4},
    "engine": {"device": "cpu", "threads": 1},
}
REAL = [("none", None), ("none", 12), ("ddp", None), ("zero2", 12), ("zero3", 12)]
SMALL = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}  # else the bucket of 2 GB is all there is


def recipe_of(**engine: Any) -> recipe.Recipe:
    changes = {"loader": {"workers": 0}, "engine": VALUE["engine"] | {"clip": None} | engine}
    return recipe.parse(VALUE | changes)


def batch_of(settings: recipe.Recipe, ranks: int = 1) -> Batch:
    stream = settings.stream("train", 0, ranks)
    assert stream is not None
    return next(iter(stream.batches(stream.start())))[0]


@cache
def model() -> Model:
    settings = recipe.parse(VALUE)
    return memory_plan.study(
        settings, settings.task(SingleProcess()), batch_of(recipe_of()), CPU, "fp32", process=7_000_000
    )


def setting(kind: str = "none", ranks: int = 1, **changes: Any) -> Setting:
    return Setting(kind, ranks, CPU, "fp32", 96, None, False)._replace(**changes)


@cache
def weights() -> int:
    return sum(4 * p.numel() for p in recipe.parse(VALUE).task(SingleProcess()).parameters())


def test_items_that_can_be_counted() -> None:
    found = memory_plan.plan(model(), setting())
    at_work = found.moments["optimizer"]
    assert at_work["process"] == 7_000_000
    assert weights() <= at_work["weights"] < 1.01 * weights()  # and a few buffers
    assert at_work["gradients"] == weights()
    assert at_work["optimizer state"] == 2 * weights()
    # Two texts of 16 ids with their masks, a vector, an id, a label, three marks of presence.
    item = 2 * (16 * 8 + 16) + 48 * 4 + 8 + 8 + 3
    assert at_work["batch"] == 96 * item
    assert found.machine == {"loader's batches, by all its workers": 4 * 96 * item}
    memory = model().recipe.objective.memory(3, 96, 96, 32)
    assert found.moments["objective"]["objective"] == memory and "objective" not in at_work
    assert found.peak == max(sum(items.values()) for items in found.moments.values())


def test_engines_share_out() -> None:
    items = {
        kind: memory_plan.plan(model(), setting(kind, 4)).moments["optimizer"]
        for kind in ("none", "ddp", "zero1", "zero2", "zero3")
    }
    assert items["ddp"]["DDP's buckets"] == items["ddp"]["weights"] - (items["none"]["weights"] - weights())
    for kind in ("zero1", "zero2", "zero3"):
        assert items[kind]["optimizer state"] == pytest.approx(2 * weights() / 4, rel=0.01)
    assert items["zero3"]["weights"] == pytest.approx(weights() / 4, rel=0.01)
    assert items["zero2"]["ZeRO's partition"] == pytest.approx(weights() / 4, rel=0.01)


def test_a_gpu_sets_deepspeeds_bucket_aside_and_offloading_moves_the_state_to_the_machine() -> None:
    gpu = setting("zero2", 2, device=torch.device("cuda"))
    found = memory_plan.plan(model(), gpu)
    assert found.moments["backward"][memory_plan.BUCKETS] == 4 * 500_000_000
    assert memory_plan.BUCKETS not in found.moments["encode"]
    always = memory_plan.plan(model(), gpu._replace(kind="zero3")).moments
    assert all(items[memory_plan.BUCKETS] == 4 * 500_000_000 for items in always.values())
    offloaded = memory_plan.plan(model(), gpu._replace(offload=True))
    assert "optimizer state" not in offloaded.moments["optimizer"]
    assert offloaded.machine["optimizer state, offloaded"] == pytest.approx(weights(), rel=0.01)
    small = model()._replace(recipe=recipe_of(options={"zero_optimization": {"reduce_bucket_size": 1000}}))
    assert memory_plan.plan(small, gpu).moments["backward"][memory_plan.BUCKETS] == 4000


def test_a_teacher_takes_weights_a_queue_and_more_columns() -> None:
    teacher_rows = recipe.parse(VALUE | {"teacher": {"views": ["c"], "queue": 4096}})
    task = teacher_rows.task(SingleProcess())
    model_of_it = memory_plan.study(teacher_rows, task, batch_of(recipe_of()), CPU, "fp32", process=7_000_000)
    setting = Setting("none", 1, CPU, "fp32", 96, None, False)
    found, without = (memory_plan.plan(m, setting).moments["objective"] for m in (model_of_it, model()))
    queue = 4096 * (32 * 4 + 1 + 8 + 8)  # z, present, ids and labels; twice, for what undoes a step
    weights = sum(p.numel() * 4 for p in task.towers["c"].parameters())
    assert found["weights"] - without["weights"] == weights + 2 * queue
    assert found["objective"] == teacher_rows.objective.memory(4, 96 + 4096, 96 + 4096, 32)


def test_smaller_micro_batches_take_less() -> None:
    peaks = [memory_plan.plan(model(), setting(micro_batch=n)).peak for n in (1, 2, 6, 12, 95)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    assert memory_plan.plan(model(), setting(micro_batch=96)) == memory_plan.plan(model(), setting())


@pytest.mark.parametrize(("kind", "options", "state"), [
    ("adamw", {}, 2.0), ("sgd", {}, 0.0), ("sgd", {"momentum": 0.9}, 1.0), ("lion", {}, 1.0), ("adan", {}, 4.0),
    ("adamw", {"amsgrad": True}, 3.0), ("adamp", {}, 2.0),
])  # fmt: skip
def test_the_optimisers_state_is_its_own(kind: str, options: dict[str, Any], state: float) -> None:
    module = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    count = sum(4 * p.numel() for p in module.parameters())
    made = optimizer_class(kind)(module.parameters(), lr=0.1, **options)
    before = [p.clone() for p in module.parameters()]
    assert memory_plan.optimizer_bytes(made, None, "cpu").state == state * count
    assert memory_plan.optimizer_bytes(made, 2, "cpu").state == state * count / 2
    assert not made.state and all(torch.equal(p, q) for p, q in zip(module.parameters(), before))


def test_adam_steps_all_weights_at_once_on_a_gpu_and_none_beside_where_fused() -> None:
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    plain, fused = (torch.optim.AdamW(module.parameters(), fused=fused) for fused in (None, True))
    weight = 4 * 64 * 64
    assert memory_plan.optimizer_bytes(plain, None, "cuda").working == 8 * weight
    assert memory_plan.optimizer_bytes(plain, None, "cpu").working <= 3 * weight
    assert memory_plan.optimizer_bytes(fused, None, "cuda") == (2 * 8 * weight, 0)


def alive(rank: int, kind: str, micro_batch: int | None) -> int:
    """The most bytes alive in the second step of a real engine."""
    settings = recipe_of(kind=kind, micro_batch=micro_batch, options=SMALL if kind.startswith("zero") else {})
    world = start(resolve(settings.engine))
    batch = batch_of(settings, world.size)
    gc.collect()
    with Live(CPU, nn.Module()) as live:
        engine = build_engine(settings, world)
        for _ in range(2):
            live.curve.clear()
            engine.step(batch)
    return max(live.curve).live


@pytest.mark.parametrize(("kind", "micro_batch"), REAL)
def test_plans_are_what_lives_in_a_step(ranks: Any, kind: str, micro_batch: int | None) -> None:
    zero, size = kind.startswith("zero"), 1 if kind == "none" else 2
    measured = ranks(2).run(alive, kind, micro_batch)[0] if size > 1 else alive(0, kind, micro_batch)
    known = model()._replace(process=0, recipe=recipe_of(options=SMALL if zero else {}))
    # A tensor counts here whether or not its memory was touched, as it does on a GPU.
    found = memory_plan.plan(known, setting(kind, size, micro_batch=micro_batch, device=torch.device("cuda")))
    predicted = max(sum(items.values()) - items["batch"] for items in found.moments.values())
    print(f"{kind} {micro_batch}: predicted {predicted:,}, measured {measured:,}")
    assert predicted == pytest.approx(measured, rel=0.06)


def test_switches_in_order_of_cost() -> None:
    known, here = model()._replace(process=0), setting("ddp", 2)
    room = memory_plan.ALLOCATOR + round(0.7 * (memory_plan.plan(known, here).peak - memory_plan.ALLOCATOR))
    found = memory_plan.switches(known, here, room, None)
    assert [name.partition("=")[0] for name, _ in found] == ["engine.micro_batch", *["engine.kind"] * 3]
    rows = int(found[0].setting.rpartition("=")[2])
    assert 1 <= rows < 48 and found[0].peak <= room
    assert found[0].peak == memory_plan.plan(known, here._replace(micro_batch=rows)).peak
    assert rows == 47 or memory_plan.plan(known, here._replace(micro_batch=rows + 1)).peak > room
    assert found[-1] == ("engine.kind=zero3", memory_plan.plan(known, here._replace(kind="zero3")).peak)


def test_all_switches_together_where_none_is_enough() -> None:
    known = model()._replace(process=0)
    here = setting("none", 1, device=torch.device("cuda"))
    found = memory_plan.switches(
        known, here, 1000, memory_plan.with_checkpointing(known, batch_of(recipe_of()), here._replace(device=CPU))
    )
    names = [name for name, _ in found]
    assert names[0] == "engine.micro_batch=1"
    assert names[1] == "checkpoint_activations=true in towers both, c"
    assert names[2] == "engine.kind=zero2 engine.offload=true"
    assert names[3] == "engine.kind=zero2 engine.offload=true checkpoint_activations=true engine.micro_batch=1"
    assert found[1].peak < memory_plan.plan(known, here).peak

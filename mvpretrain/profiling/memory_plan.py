"""What a run will take in memory, rank by rank and item by item, before it starts: `mvpretrain train RECIPE --dry-run`.

The towers are run on a few rows and every tensor's life is followed; an operation's bytes are a constant and a multiple
of the rows, so that any number of rows follows. What engines hold besides is counted from their rules, and was compared
with measured runs by tools/bench/memory_plan.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.engine.optimizer import build_optimizer, same_kind
from mvpretrain.model.task import Task
from mvpretrain.profiling.measure import Live, Passes, byte_count, passes
from mvpretrain.recipe import Recipe
from mvpretrain.types import Batch, RecomputesActivations

BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time, and the size of its buffer
BUCKETS = "DeepSpeed's bucket"
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered
COPIES = 2.5  # times the trained weights: what a CPU process holds besides under ZeRO-3, of messages, as measured
ALLOCATOR = 160 * 2**20  # bytes of a process that glibc keeps free between live tensors and after them, as measured


class Setting(NamedTuple):
    """What a plan depends on besides the model."""

    kind: str  # none, ddp, zero0 to zero3
    ranks: int
    device: torch.device
    precision: str
    batch: int  # global
    micro_batch: int | None
    offload: bool

    @property
    def rows(self) -> int:
        return self.batch // self.ranks

    @property
    def at_a_time(self) -> int:
        """Rows of a rank that are encoded together."""
        return min(self.micro_batch or self.rows, self.rows)

    @property
    def stage(self) -> int:
        return int(self.kind[-1]) if self.kind.startswith("zero") else 0


class Plan(NamedTuple):
    """Bytes of one rank by item at each moment of a step; `machine` is memory of the machine, not of the rank."""

    moments: dict[str, dict[str, int]]
    machine: dict[str, int]

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(items.values()) for name, items in self.moments.items()}

    @property
    def peak(self) -> int:
        return max(self.totals.values())


class OptimizerBytes(NamedTuple):
    """Bytes of an optimiser: its state, and what it needs at once while it steps."""

    state: int
    working: int


def optimizer_bytes(chosen: torch.optim.Optimizer, parts: int | None, on: str) -> OptimizerBytes:
    """What the optimiser holds on one rank, by steps of one of its kind whose tensors have no memory.

    `parts`: among how many ranks ZeRO divides it, None without ZeRO. Where torch cannot step without memory (an
    optimiser that reads its numbers), two numbers a weight, as Adam has, are assumed.
    """
    groups: list[dict[str, Any]] = []
    for group in chosen.param_groups:
        shapes = [p.shape for p in group["params"]]
        if parts:  # DeepSpeed hands over one flat piece a group
            shapes = [torch.Size([-(-sum(s.numel() for s in shapes) // parts)])]
        members = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        for member in members:
            member.grad = torch.empty_like(member)
        fast = {"foreach": True} if "foreach" in group and on == "cuda" else {}
        groups.append({**group, **fast, **({"fused": None} if "fused" in group else {}), "params": members})
    try:
        trial = same_kind(chosen, groups)
        with Live(torch.device("meta"), nn.Module()) as first:
            trial.step()
        with Live(torch.device("meta"), nn.Module()) as later:
            trial.step()
    except (RuntimeError, NotImplementedError, ValueError):
        whole = sum(p.numel() * 4 for group in groups for p in group["params"])
        return OptimizerBytes(2 * whole, whole)
    fused = any(group.get("fused") for group in chosen.param_groups)
    return OptimizerBytes(first.live, 0 if fused else max(later.curve).live)


class Model(NamedTuple):
    """What a plan needs to know of a recipe's towers, objective and optimiser."""

    recipe: Recipe
    passes: Passes
    optimizer: Callable[[int | None, str], OptimizerBytes]
    weights: int  # bytes of all parameters, the teacher's too, and of buffers twice, its queue among them
    trained: int  # bytes of those that have a gradient
    can_checkpoint: tuple[str, ...]  # towers that could, and do not yet
    process: int  # bytes of the process before there was a model, 0 for a GPU


def study(recipe: Recipe, task: Task, batch: Batch, device: torch.device, precision: str, process: int) -> Model:
    """Run the task's towers and its optimiser as far as a plan needs it; the task is left in training mode."""
    chosen = build_optimizer(task, recipe.towers, recipe.optimizer)
    able = [name for name, tower in task.towers.items() if isinstance(tower.encoder, RecomputesActivations)]
    return Model(
        recipe,
        passes(task, batch, device, precision),
        cache(partial(optimizer_bytes, chosen)),
        # Engines keep a second copy of buffers during a step, to undo it.
        sum(byte_count(x) for x in (*task.parameters(), *task.buffers(), *task.buffers())),
        sum(byte_count(p) for p in task.parameters() if p.requires_grad),
        tuple(name for name in able if not recipe.towers[name].checkpoint_activations),
        process if device.type == "cpu" else 0,
    )


def plan(model: Model, setting: Setting) -> Plan:
    """Bytes by item at each moment of a step, and what the machine needs besides."""
    recipe, cut = model.recipe, setting.at_a_time < setting.rows
    state = model.optimizer(setting.ranks if setting.stage else None, setting.device.type)
    always, machine = held(model, setting, state)
    columns, queue = len(recipe.columns()), recipe.teacher.queue if recipe.teacher else 0
    local, gathered = setting.rows + queue // setting.ranks, setting.batch + queue
    objective = recipe.objective.memory(columns, local, gathered, recipe.row_dim())
    forward, backward, again = model.passes.at(setting.at_a_time)
    if cut:
        # GradCache keeps the whole table and its gradient while it goes through the rows again.
        table = (len(recipe.views) + columns) * setting.rows * recipe.row_dim() * 4
        moments = {
            "objective": {"objective": objective},
            "backward": {"activations": max(again).live + table, "gradients": model.trained},
        }
        if setting.stage:
            moments["reduce"] = {"gradients": model.trained, BUCKETS: bucket_bytes(model, setting, model.trained)}
    else:
        most = max(backward, key=lambda m: m.live - m.gradients + reduced(model, setting, m.gradients)[1])
        name, gradients = reduced(model, setting, most.gradients)
        moments = {
            "encode": {"activations": max(forward).live},
            "objective": {"activations": forward[-1].live, "objective": objective},
            "backward": {"activations": most.live - most.gradients, name: gradients},
        }
    if setting.stage == 3:
        for items in moments.values():
            items["gathered weights"] = min(model.weights, LIVE * 4)
    gradients = 2 * model.trained // setting.ranks if setting.stage else model.trained
    moments["optimizer"] = {"gradients": gradients, "optimizer at work": state.working}
    # A bucket that is held anyway is the same one.
    lasting = {k: v for k, v in always.items() if v}
    return Plan({name: lasting | items | lasting for name, items in moments.items()}, machine)


def held(model: Model, setting: Setting, state: OptimizerBytes) -> tuple[dict[str, int], dict[str, int]]:
    """(what a rank holds throughout a step, what the machine holds for it besides), in bytes by item."""
    stage, on_gpu, piece = setting.stage, setting.device.type == "cuda", model.trained // setting.ranks
    found = {
        "process": model.process,
        "allocator": 0 if on_gpu else ALLOCATOR + (int(COPIES * model.trained) if stage == 3 else 0),
        "weights": model.weights // setting.ranks if stage == 3 else model.weights,
        "batch": model.passes.item * (setting.at_a_time if on_gpu else setting.rows),
        "DDP's buckets": model.trained if setting.kind == "ddp" else 0,
        BUCKETS: bucket_bytes(model, setting, 0) if stage == 3 else 0,
    }
    partition = {0: 0, 1: piece, 2: piece, 3: 2 * piece}[stage]  # fp32 weights; under ZeRO-3 also gradients
    movable = {"optimizer state": state.state, "ZeRO's partition": partition + (piece if setting.offload else 0)}
    machine = {"loader's batches, by all its workers": loader_bytes(model, setting)}
    if setting.offload and on_gpu:
        return found, machine | {f"{name}, offloaded": count for name, count in movable.items()}
    return found | movable, machine


def bucket_bytes(model: Model, setting: Setting, gradients: int) -> int:
    """Bytes of DeepSpeed's bucket: a GPU sets it aside whole, on a CPU it is what was written into it."""
    options = model.recipe.engine.options.get("zero_optimization", {})
    whole = 4 * int(options.get("reduce_bucket_size", BUCKET))
    return whole if setting.device.type == "cuda" else min(gradients, whole)


def reduced(model: Model, setting: Setting, gradients: int) -> tuple[str, int]:
    """(item, bytes) of so many bytes of gradients in the backward: ZeRO moves them into its bucket."""
    return (BUCKETS, bucket_bytes(model, setting, gradients)) if setting.stage else ("gradients", gradients)


def loader_bytes(model: Model, setting: Setting) -> int:
    """Bytes of the batches that one rank's workers have ready."""
    config = model.recipe.loader
    ahead = -(-config.prefetch // config.workers) * config.workers if config.workers else 0
    return ahead * setting.rows * model.passes.item


class Switch(NamedTuple):
    """A setting that takes less memory, and the peak that it is predicted to have."""

    setting: str
    peak: int


def switches(model: Model, setting: Setting, room: int, checkpointed: Model | None) -> list[Switch]:
    """What to turn where a plan does not fit into `room` bytes, in order of cost; all of them together if none will.

    `checkpointed` is the model whose towers checkpoint their activations, None where none of them can.
    """
    options = [with_micro_batch(model, setting, room)]
    if checkpointed:
        where = ", ".join(model.can_checkpoint)
        options.append((f"checkpoint_activations=true in towers {where}", checkpointed, setting))
    stages = [f"zero{stage}" for stage in (1, 2, 3) if setting.ranks > 1 and stage > setting.stage]
    options += [(f"engine.kind={kind}", model, setting._replace(kind=kind)) for kind in stages]
    last = setting._replace(kind=stages[-1] if stages else setting.kind)
    if setting.device.type == "cuda" and not setting.offload:
        kind = setting.kind if setting.stage else "zero2"
        options.append((f"engine.kind={kind} engine.offload=true", model, setting._replace(kind=kind, offload=True)))
        last = last._replace(kind=last.kind if last.stage else "zero2", offload=True)
    found = [Switch(name, plan(its, to).peak) for name, its, to in options]
    if any(switch.peak <= room for switch in found):
        return found
    name, its, to = with_micro_batch(checkpointed or model, last, room)
    together = [f"engine.kind={to.kind}"] if to.kind != setting.kind else []
    together += ["engine.offload=true"] if to.offload != setting.offload else []
    together += ["checkpoint_activations=true"] if checkpointed else []
    return [*found, Switch(" ".join([*together, name]), plan(its, to).peak)] if together else found


def with_micro_batch(model: Model, setting: Setting, room: int) -> tuple[str, Model, Setting]:
    """The largest micro-batch that fits into `room`, or that of one row where none does."""
    rows = bisect_right(range(1, setting.rows), room, key=lambda n: plan(model, setting._replace(micro_batch=n)).peak)
    return f"engine.micro_batch={max(1, rows)}", model, setting._replace(micro_batch=max(1, rows))


def with_checkpointing(model: Model, batch: Batch, setting: Setting) -> Model | None:
    """The model with checkpointed activations in every tower that can, None where none can that does not yet."""
    if not model.can_checkpoint:
        return None
    switch = {"checkpoint_activations": True}
    recipe = model.recipe
    towers = {n: t.model_copy(update=switch) if n in model.can_checkpoint else t for n, t in recipe.towers.items()}
    changed = recipe.model_copy(update={"towers": towers})
    return study(changed, changed.task(SingleProcess()), batch, setting.device, setting.precision, model.process)

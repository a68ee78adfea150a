"""What a run would be, without running it: `mvpretrain train RECIPE --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from mvpretrain.data.build import count_samples, describe_damages
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.engine import resolve
from mvpretrain.engine.optimizer import build_optimizer
from mvpretrain.model.task import Task
from mvpretrain.profiling import measure, memory_plan
from mvpretrain.profiling.measure import format_bytes
from mvpretrain.profiling.memory_plan import Model, Plan, Setting
from mvpretrain.recipe import Recipe
from mvpretrain.types import Batch


def print_dry_run(recipe: Recipe, console: Console, memory: int | None = None) -> Plan:
    """The resolved recipe, towers, steps, the first decoded batch through the towers, and the memory of a rank.

    `memory` is what one rank may use, in bytes; by default its GPU, or its part of what this machine has left. Where
    the predicted peak is more, the switches that make it less are named. ValueError, before anything is printed:
    whatever would stop the run itself before its first step.
    """
    resolved = resolve(recipe.engine.model_copy(update={"ranks": None}))
    kind, precision, device = resolved.kind, resolved.precision, resolved.device
    ranks = recipe.engine.ranks or resolved.size
    stream = recipe.stream("train", 0, ranks)
    assert stream is not None
    process = measure.resident()
    task = recipe.task(SingleProcess())
    build_optimizer(task, recipe.towers, recipe.optimizer)
    batch, _, skipped = next(iter(stream.batches(stream.start())))
    shapes = first_batch(batch, skipped, task)
    console.print(recipe.dump(), markup=False, highlight=False, soft_wrap=True)
    console.print(towers(recipe, task))
    steps, samples = recipe.total_steps(count_samples(stream.sources)), count_samples(stream.sources)
    held_out = count_samples(recipe.data.build(recipe.views, train=False))
    rows = recipe.batch // ranks
    console.print(
        f"steps: {steps} of {recipe.batch} samples, {steps * recipe.batch / samples:.1f} epochs of {samples}, "
        f"{held_out} held out\n"
        f"engine: {kind} on {ranks} rank(s), {device.type}, {precision}; {rows} samples a rank\n"
        f"objective: {recipe.objective.kind}"
    )
    if recipe.teacher:
        console.print(teacher_rows(recipe, task))
    for damage in describe_damages(stream.sources):
        console.print(damage, markup=False, highlight=False, soft_wrap=True)
    console.print(shapes)
    model = memory_plan.study(recipe, task, batch, device, precision, process)
    del task
    config = recipe.engine
    setting = Setting(kind, ranks, device, precision, recipe.batch, config.micro_batch, config.offload)
    found = memory_plan.plan(model, setting)
    for line in (memory_table(found), *notes(found)):
        console.print(line)
    room = memory or measure.room(device, ranks)
    console.print(verdict(found, room), markup=False, highlight=False, soft_wrap=True)
    if found.peak > room:
        console.print(remedies(model, batch, setting, room))
    return found


def towers(recipe: Recipe, task: Task) -> Table:
    table = Table("tower", "encoder", "views", "parameters", "trained", title="towers")
    for name, tower in task.towers.items():
        counts = [(p.numel(), p.requires_grad) for p in tower.parameters()]
        users = ", ".join(v for v, t in task.views.items() if t == name)
        total, trained = sum(n for n, _ in counts), sum(n for n, on in counts if on)
        table.add_row(name, recipe.towers[name].encoder.kind, users, f"{total:,}", f"{trained:,}")
    return table


def teacher_rows(recipe: Recipe, task: Task) -> str:
    assert recipe.teacher
    count = sum(p.numel() for p in task.teacher.parameters())
    queue = f", a queue of {recipe.teacher.queue} rows" if recipe.teacher.queue else ""
    return (
        f"teacher: momentum {recipe.teacher.momentum}, views {', '.join(task.teacher.views)}, "
        f"{count:,} parameters that are not trained{queue}"
    )


def first_batch(batch: Batch, skipped: Mapping[str, int], task: Task) -> Table:
    """The shapes of the first batch, which has also gone through the towers."""
    embeddings = task.eval().encode(batch)
    table = Table("view", "data", "type", "mask", "present", "embedding", title="first batch of rank 0")
    for name, view in batch.views.items():
        mask = "none" if view.mask is None else f"{view.mask.float().mean():.0%} filled"
        shape, present = "x".join(map(str, view.data.shape)), f"{int(batch.present[name].sum())} of {len(batch.ids)}"
        out = "x".join(map(str, embeddings.z[name].shape))
        table.add_row(name, shape, str(view.data.dtype).removeprefix("torch."), mask, present, out)
    if skipped:
        table.caption = "not usable: " + ", ".join(f"{reason} ({count})" for reason, count in skipped.items())
    return table


def memory_table(plan: Plan) -> Table:
    """Items by moments of a step."""
    table = Table("memory of a rank", title="predicted memory of a rank by moments of a step")
    for name in plan.moments:
        table.add_column(name, justify="right")
    for item in dict.fromkeys(item for items in plan.moments.values() for item in items):
        bytes_ = [items.get(item, 0) for items in plan.moments.values()]
        if any(bytes_):
            table.add_row(item, *(format_bytes(count) if count else "" for count in bytes_))
    table.add_section()
    table.add_row("all", *(format_bytes(total) for total in plan.totals.values()))
    return table


def notes(plan: Plan) -> Iterator[str]:
    for item, count in plan.machine.items():
        if count:
            yield f"besides, in the machine's memory: {item}: {format_bytes(count)} a rank"


def verdict(plan: Plan, room: int) -> str:
    moment = max(plan.totals, key=lambda name: plan.totals[name])
    fits = "it fits into" if plan.peak <= room else "it does not fit into"
    return f"predicted peak: {format_bytes(plan.peak)} a rank, at the moment '{moment}'; {fits} {format_bytes(room)}"


def remedies(model: Model, batch: Batch, setting: Setting, room: int) -> Table:
    """The switches that take less memory, in order of cost."""
    table = Table("switch", "predicted peak", "", title=f"to fit into {format_bytes(room)} a rank, the cheapest first")
    for name, peak in memory_plan.switches(model, setting, room, memory_plan.with_checkpointing(model, batch, setting)):
        table.add_row(name, format_bytes(peak), "fits" if peak <= room else "too large")
    return table

"""What a run would be, without running it: `mvpretrain train RECIPE --dry-run`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mvpretrain import feed, optim
from mvpretrain.engine import settle
from mvpretrain.exchange import Alone
from mvpretrain.recipe import Recipe
from mvpretrain.task import Task


def preview(recipe: Recipe, console: Console) -> None:
    """Towers and their parameters, steps, memory of the objective, and the first decoded batch through the towers.

    ValueError: whatever would stop the run itself before its first step.
    """
    kind, precision, device, _, started = settle(recipe.engine.model_copy(update={"ranks": None}))
    ranks = recipe.engine.ranks or started
    stream = feed.stream(recipe, "train", 0, ranks)
    assert stream is not None
    task = recipe.task(Alone())
    optim.build(task, recipe.towers, recipe.optimizer)
    console.print(towers(recipe, task))
    steps, samples = recipe.total_steps(feed.samples(stream)), feed.samples(stream)
    held_out = sum(int(source.counts.sum()) for source in feed.sources(recipe, "eval"))
    rows = recipe.batch // ranks
    memory = recipe.objective.memory(len(recipe.views), rows, recipe.batch, recipe.dim)
    console.print(
        f"steps: {steps} of {recipe.batch} samples, {steps * recipe.batch / samples:.1f} epochs of {samples}, "
        f"{held_out} held out\n"
        f"engine: {kind} on {ranks} rank(s), {device.type}, {precision}; {rows} samples a rank\n"
        f"objective: {recipe.objective.kind}, {memory / 2**20:.1f} MiB a rank"
    )
    for damage in feed.damages(stream):
        console.print(damage, markup=False, highlight=False, soft_wrap=True)
    console.print(first_batch(stream, task))


def towers(recipe: Recipe, task: Task) -> Table:
    table = Table("tower", "encoder", "views", "parameters", "trained", title="towers")
    for name, tower in task.towers.items():
        counts = [(p.numel(), p.requires_grad) for p in tower.parameters()]
        users = ", ".join(v for v, t in task.views.items() if t == name)
        total, trained = sum(n for n, _ in counts), sum(n for n, on in counts if on)
        table.add_row(name, recipe.towers[name].encoder.kind, users, f"{total:,}", f"{trained:,}")
    return table


def first_batch(stream: feed.Stream, task: Task) -> Table:
    """The shapes of the first batch, which has also gone through the towers."""
    batch, _, skipped = next(iter(stream.batches(stream.start())))
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

"""One step of any engine: on all rows at once, or micro-batch by micro-batch in two passes (GradCache).

Contrastive losses need the whole batch's embeddings, but not its activations. The first pass encodes micro-batches
without a graph, the objective is called once on all of their embeddings and says its gradient in them, and the second
pass encodes each micro-batch again, as it was, and sends its part of that gradient back through the towers (Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Memory is that of one micro-batch and
of the embeddings; the gradient is that of the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mvpretrain.distributed import sample_state
from mvpretrain.engine.step import Engine, Step, autocast, reduce_status, restore_buffers, snapshot_buffers
from mvpretrain.model.task import EmbeddingGradients, Task
from mvpretrain.types import Batch, Embeddings, Losses, map_tensors


def step(engine: Engine, batch: Batch, values: Sequence[float]) -> Step:
    """One step of any engine: losses, status of all ranks, gradients, optimiser, EMA.

    Where the loss or the gradient is not finite on some rank, nothing is changed on any.
    """
    task, world, phase_timer = engine.task, engine.world, engine.phase_timer
    engine.model.train()
    before = snapshot_buffers(task)
    pieces = split(engine, batch)
    losses, backward = in_one_pass(engine, batch) if pieces is None else in_two_passes(engine, batch, pieces)
    loss, good, sums = reduce_status(world, losses.total, values)
    norm = None
    if good:
        backward()
        with phase_timer("optimizer"):
            norm, good = engine.optimizer_step()
            if good:
                engine.update_ema()
    if not good:
        restore_buffers(task, before)
        sample_state.discard(task)
    phase_timer.step()
    return Step(loss, losses.parts, norm, good, sums)


def in_one_pass(engine: Engine, batch: Batch) -> tuple[Losses, Callable[[], None]]:
    """(the losses, how to go back from them) of all rows at once."""
    losses: Losses = engine.model(batch.to(engine.world.device))

    def backward() -> None:
        with engine.phase_timer("backward"):
            engine.backward(losses.total)

    return losses, backward


class Pieces(NamedTuple):
    """A batch in micro-batches; every rank has as many. Those from `own` on are repeated rows, which count nowhere."""

    batches: list[Batch]
    own: int


class FirstPass(NamedTuple):
    """What the second pass needs to know of the first."""

    generators: list[list[Tensor]]  # as they were before each micro-batch
    buffers: list[Tensor]  # of the towers, as this rank's own rows have left them


def split(engine: Engine, batch: Batch) -> Pieces | None:
    """The batch in micro-batches that differ by one row at most; None where it needs no cutting.

    Ranks may bring unequal numbers of rows, but must make the same calls: under ZeRO-3, modules gather their weights.
    """
    most, rows = engine.config.micro_batch, len(batch.ids)
    if most is None:
        return None
    count = -(-engine.world.collectives.largest(rows) // most)
    if count <= 1:
        return None
    own = max(1, -(-rows // most))
    ends = [rows * i // own for i in range(own + 1)]
    batches = [batch.rows(slice(begin, end)) for begin, end in pairwise(ends)]
    return Pieces(batches + batches[:1] * (count - own), own)


def in_two_passes(engine: Engine, batch: Batch, pieces: Pieces) -> tuple[Losses, Callable[[], None]]:
    """(the losses, how to go back from them), one micro-batch's activations at a time."""
    z, first = first_pass(engine, pieces)
    task, device = engine.task, engine.world.device
    leaves = {v: z[v].requires_grad_() for v in task.views}
    present = {v: p.to(device, non_blocking=True) for v, p in batch.present.items()}
    students = Embeddings(leaves, batch.ids.to(device), present, batch.labels.to(device))
    # A table of its own: ZeRO-3's hooks replace the tensors in the dicts that modules are given.
    losses = task.score(task.teacher.add_views(students, {v: z[v] for v in task.teacher.views}))
    return losses, partial(second_pass, engine, pieces, first, leaves, losses.total)


@torch.no_grad()
def first_pass(engine: Engine, pieces: Pieces) -> tuple[dict[str, Tensor], FirstPass]:
    """The embeddings of this rank's rows, the teacher's among them: the second pass is the students' alone."""
    task, device = engine.task, engine.world.device
    precision = engine.world.precision if engine.config.first_pass == "same" else engine.config.first_pass
    tables: list[dict[str, Tensor]] = []
    generators = [generators_of(device)]
    buffers: list[Tensor] = []
    teacher_rows: list[Tensor] = []
    with engine.phase_timer("encode"), autocast(device, precision):
        for i, piece in enumerate(pieces.batches):
            tables.append(task.table(piece.to(device)).z)
            generators.append(generators_of(device))
            if i + 1 == pieces.own:
                buffers, teacher_rows = snapshot_buffers(task.towers), snapshot_buffers(task.teacher.towers)
    # As if the repeated rows had not been there.
    set_generators(device, generators[pieces.own])
    restore_buffers(task.teacher.towers, teacher_rows)
    return map_tensors(lambda *z: torch.cat(z), *tables[: pieces.own]), FirstPass(generators, buffers)


def second_pass(engine: Engine, pieces: Pieces, first: FirstPass, leaves: dict[str, Tensor], loss: Tensor) -> None:
    """The gradient of the loss in all parameters, reduced over ranks once."""
    task, device = engine.task, engine.world.device
    with engine.phase_timer("backward"):
        wanted = gradients(task, leaves, loss)
    after = generators_of(device)
    begin = 0
    for i in engine.reducing_once(len(pieces.batches)):
        piece, end = pieces.batches[i], begin + len(pieces.batches[i].ids)
        if i < pieces.own:
            z = {v: g[begin:end] for v, g in wanted.z.items()}
        else:
            z = {v: g.new_zeros(len(piece.ids), g.shape[1]) for v, g in wanted.z.items()}
        # The objective's parameters take part once, in the last piece: DDP reduces there, and wants all of them in it.
        last = i + 1 == len(pieces.batches)
        set_generators(device, first.generators[i])
        surrogate: Tensor = engine.model(piece.to(device), EmbeddingGradients(z, wanted.parameters if last else []))
        if surrogate.requires_grad:  # not so where all towers are frozen whole
            with engine.phase_timer("backward"):
                engine.backward(surrogate)
        begin = end
    set_generators(device, after)
    restore_buffers(task.towers, first.buffers)


def gradients(task: Task, leaves: dict[str, Tensor], loss: Tensor) -> EmbeddingGradients:
    """The loss's gradient in the embeddings and in the objective's parameters; zero where it does not depend on one."""
    own = task.objective_parameters()
    found = torch.autograd.grad(loss, [*leaves.values(), *own], allow_unused=True, materialize_grads=True)
    return EmbeddingGradients(dict(zip(leaves, found)), list(found[len(leaves) :]))


def generators_of(device: torch.device) -> list[Tensor]:
    """The states of torch's generators that an encoder may draw from."""
    gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *gpu]


def set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

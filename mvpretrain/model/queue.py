"""A queue of the teacher's past rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.types import Embeddings


class Queue(nn.Module):
    """The teacher's last rows, oldest first, the same on every rank.

    State: z [views, rows, dim], present [views, rows], ids [rows] and labels [rows]. Slots that are not filled yet are
    absent rows of id -1.
    """

    z: Tensor
    present: Tensor
    ids: Tensor
    labels: Tensor

    def __init__(self, views: Sequence[str], rows: int, dim: int, collectives: Collectives):
        super().__init__()
        self.views, self.collectives = list(views), collectives
        self.register_buffer("z", torch.zeros(len(views), rows, dim))
        self.register_buffer("present", torch.zeros(len(views), rows, dtype=torch.bool))
        self.register_buffer("ids", torch.full((rows,), -1))
        self.register_buffer("labels", torch.full((rows,), -1))

    def append_queue(self, mine: Embeddings, gathered: Embeddings) -> tuple[Embeddings, Embeddings]:
        """Both tables with the queue's rows after the batch's: a part of them in `mine`, every rank's in `gathered`.

        So `gathered` stays the ranks' tables one after another, though nothing more was sent.
        """
        held, size = self.table(mine), self.collectives.size
        both = interleaved(gathered, held, size)
        if size == 1:
            return both, both
        part = len(held.ids) // size
        return interleaved(
            mine, rows_of(held, slice(self.collectives.rank * part, (self.collectives.rank + 1) * part))
        ), both

    def table(self, like: Embeddings) -> Embeddings:
        """The rows as a table of the same views: those of the students are absent."""
        places = {v: i for i, v in enumerate(self.views)}
        nothing, absent = torch.zeros_like(self.z[0]), torch.zeros_like(self.present[0])
        z = {v: self.z[places[v]] if v in places else nothing for v in like.z}
        present = {v: self.present[places[v]] if v in places else absent for v in like.present}
        return Embeddings(z, self.ids, present, self.labels)

    @torch.no_grad()
    def push(self, mine: Embeddings, gathered: Embeddings) -> None:
        """Add the batch's rows that have a teacher's view; the oldest go."""
        if gathered.z:
            z = torch.stack([gathered.z[v] for v in self.views])
        else:  # the objective passes its tables round a ring of ranks, and nobody has gathered them
            z = self.collectives.gather(torch.stack([mine.z[v] for v in self.views], dim=1)).transpose(0, 1)
        present = torch.stack([gathered.present[v] for v in self.views])
        some = present.any(dim=0)
        for held, new, axis in (
            (self.z, z[:, some], 1),
            (self.present, present[:, some], 1),
            (self.ids, gathered.ids[some], 0),
            (self.labels, gathered.labels[some], 0),
        ):
            rows = held.shape[axis]
            both = torch.cat([held, new.to(held.dtype)], dim=axis)
            held.copy_(both.narrow(axis, both.shape[axis] - rows, rows))


def interleaved(one: Embeddings, other: Embeddings, parts: int = 1) -> Embeddings:
    """The first part of one table, the first of the other, the second of the one, and so on."""

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        cut = [t.reshape(parts, len(t) // parts, *t.shape[1:]) for t in (x, y.to(x.dtype))]
        return torch.cat(cut, dim=1).flatten(0, 1)

    return Embeddings(
        {v: mixed(z, other.z[v]) for v, z in one.z.items()},
        mixed(one.ids, other.ids),
        {v: mixed(p, other.present[v]) for v, p in one.present.items()},
        mixed(one.labels, other.labels),
    )


def rows_of(table: Embeddings, rows: slice) -> Embeddings:
    return Embeddings(
        {v: z[rows] for v, z in table.z.items()},
        table.ids[rows],
        {v: p[rows] for v, p in table.present.items()},
        table.labels[rows],
    )

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

    def append_queue(self, local: Embeddings, gathered: Embeddings) -> tuple[Embeddings, Embeddings]:
        """Both tables with the queue's rows after the batch's: a part of them in `local`, every rank's in `gathered`.

        So `gathered` stays the ranks' tables one after another, though nothing more was sent.
        """
        size = self.collectives.size
        held = self.table(local).split(size)
        both = Embeddings.cat([part for pair in zip(gathered.split(size), held, strict=True) for part in pair])
        return (both if size == 1 else Embeddings.cat([local, held[self.collectives.rank]])), both

    def table(self, like: Embeddings) -> Embeddings:
        """The rows as a table of the same views: those of the students are absent."""
        index = {v: i for i, v in enumerate(self.views)}
        nothing, absent = torch.zeros_like(self.z[0]), torch.zeros_like(self.present[0])
        z = {v: (self.z[index[v]] if v in index else nothing).to(x.dtype) for v, x in like.z.items()}
        present = {v: self.present[index[v]] if v in index else absent for v in like.present}
        return Embeddings(z, self.ids, present, self.labels)

    @torch.no_grad()
    def push(self, local: Embeddings, gathered: Embeddings) -> None:
        """Add the batch's rows that have a teacher's view; the oldest go."""
        if gathered.z:
            z = torch.stack([gathered.z[v] for v in self.views])
        else:  # the objective passes its tables round a ring of ranks, and nobody has gathered them
            z = self.collectives.gather(torch.stack([local.z[v] for v in self.views], dim=1)).transpose(0, 1)
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

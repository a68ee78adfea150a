"""Encoded batches of every rank as one table on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.model.heads import unit
from mvpretrain.model.task import Task
from mvpretrain.model.tower import Tower
from mvpretrain.types import Batch, Embeddings, map_tensors


class Table(NamedTuple):
    """One row a sample, on the CPU; a row that is absent in a view holds filler there."""

    z: dict[str, Float[Tensor, "n d"]]  # unit rows, float32
    features: dict[str, Float[Tensor, "n e"]]  # the encoders' outputs before the heads, float32; empty if not asked for
    ids: Int64[Tensor, " n"]
    present: dict[str, Bool[Tensor, " n"]]
    labels: Int64[Tensor, " n"]  # -1 where unknown


Watch = Callable[[Embeddings, Embeddings], None]


def collect(
    task: Task,
    batches: Iterable[Batch],
    collectives: Collectives,
    device: torch.device,
    features: bool = False,
    watch: Watch | None = None,
) -> Table:
    """The whole table on every rank, in the order in which the batches and, within a batch, the ranks come.

    Every rank must bring equally many batches, of any size. Rows with id -1 that have no view are padding and left out.
    `watch` sees each step's (local, every) tables as an objective would. The caller sets evaluation mode, no_grad and
    autocast. ValueError: no sample at all.
    """
    parts: list[Table] = []
    for batch in batches:
        local, outputs = encode(task, batch.to(device), features)
        mine, every = gather_embeddings(local, collectives)
        if watch:
            watch(mine, every)
        rows = len(mine.ids)
        found = {
            v: collectives.gather(torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])) for v, x in outputs.items()
        }
        parts.append(kept(every, found))
    if not sum(len(part.ids) for part in parts):
        raise ValueError("there is no sample to evaluate; check data.eval and evaluation.limit")
    return joined(parts)


def encode(task: Task, batch: Batch, features: bool) -> tuple[Embeddings, dict[str, Tensor]]:
    """(unit rows, features), the latter empty if not asked for; the encoders run once."""
    if not features:
        return task.encode(batch), {}
    outputs = {v: x.float() for v, x in task.features(batch).items()}
    heads = {v: cast(Tower, task.towers[tower]).head for v, tower in task.views.items()}
    z = {v: unit(heads[v](x), task.heads) for v, x in outputs.items()}
    return Embeddings(z, batch.ids, batch.present, batch.labels), outputs


def kept(every: Embeddings, features: dict[str, Tensor]) -> Table:
    """The gathered rows on the CPU without the padding."""
    real = (every.ids != -1) | torch.stack(list(every.present.values())).any(dim=0)
    table = Table(every.z, features, every.ids, every.present, every.labels)
    found = map_tensors(lambda x: x[real].detach().cpu(), table)
    return found._replace(z={v: z.float() for v, z in found.z.items()})


def joined(parts: list[Table]) -> Table:
    """Tables one below the other."""
    return map_tensors(lambda *columns: torch.cat(columns), *parts)

"""Encoded batches of every rank as one table on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import gather_embeddings
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

    @staticmethod
    def cat(tables: Sequence[Table]) -> Table:
        """Tables of the same views one below the other."""
        return map_tensors(lambda *columns: torch.cat(columns), *tables)


OnBatch = Callable[[Embeddings, Embeddings], None]


def collect(
    task: Task,
    batches: Iterable[Batch],
    collectives: Collectives,
    device: torch.device,
    features: bool = False,
    on_batch: OnBatch | None = None,
) -> Table:
    """The whole table on every rank, in the order in which the batches and, within a batch, the ranks come.

    Every rank must bring equally many batches, of any size. Rows with id -1 that have no view are padding and left out.
    `on_batch` is called with each batch's (local, gathered) tables, as an objective would be. The caller sets
    evaluation mode, no_grad and autocast. ValueError: no sample at all.
    """
    tables: list[Table] = []
    for batch in batches:
        local, outputs = encode(task, batch.to(device), features)
        local, gathered = gather_embeddings(local, collectives)
        if on_batch:
            on_batch(local, gathered)
        rows = len(local.ids)
        found = {
            v: collectives.gather(torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])) for v, x in outputs.items()
        }
        tables.append(without_padding(gathered, found))
    if not sum(len(table.ids) for table in tables):
        raise ValueError("there is no sample to evaluate; check data.eval and evaluation.limit")
    return Table.cat(tables)


def encode(task: Task, batch: Batch, features: bool) -> tuple[Embeddings, dict[str, Tensor]]:
    """(unit rows, features), the latter empty if not asked for; the encoders run once."""
    if not features:
        return task.encode(batch), {}
    outputs = {v: x.float() for v, x in task.features(batch).items()}
    towers = {v: cast(Tower, task.towers[tower]) for v, tower in task.views.items()}
    z = {v: towers[v].embed_features(x) for v, x in outputs.items()}
    return Embeddings(z, batch.ids, batch.present, batch.labels), outputs


def without_padding(gathered: Embeddings, features: dict[str, Tensor]) -> Table:
    """The gathered rows on the CPU without the padding."""
    real = (gathered.ids != -1) | torch.stack(list(gathered.present.values())).any(dim=0)
    table = Table(gathered.z, features, gathered.ids, gathered.present, gathered.labels)
    found = map_tensors(lambda x: x[real].detach().cpu(), table)
    return found._replace(z={v: z.float() for v, z in found.z.items()})

"""One packed gather for whole tables of embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.types import Embeddings


def gather_embeddings(
    local: Embeddings, collectives: Collectives, gathers: Callable[[int, int], bool] | None = None
) -> tuple[Embeddings, Embeddings]:
    """(this rank's table, everyone's) by one gather of one packed tensor.

    Ranks may bring unequal numbers of rows: short tables are padded with rows that are absent in every view, so that
    both tables tell the number of parts by their lengths. Integers travel as bit patterns in columns of z's type.
    Where `gathers(rows a rank, dim)` is False, the gathered table comes without z.
    """
    if collectives.size == 1:
        return local, local
    local = local.pad(collectives.largest(len(local.ids)))
    z = next(iter(local.z.values()))
    kind, views = z.dtype, list(local.z)
    names = views if gathers is None or gathers(*z.shape) else []
    columns = [local.z[v] for v in names]
    columns += [local.present[v].to(kind).unsqueeze(1) for v in views]
    columns += [local.ids.unsqueeze(1).view(kind), local.labels.unsqueeze(1).view(kind)]
    widths = [c.shape[1] for c in columns]
    gathered = collectives.gather(torch.cat(columns, dim=1)).split(widths, dim=1)
    k = len(names)
    return local, Embeddings(
        z=dict(zip(names, gathered[:k])),
        present={v: gathered[k + i].squeeze(1) > 0.5 for i, v in enumerate(views)},
        ids=gathered[-2].detach().contiguous().view(torch.int64).squeeze(1),
        labels=gathered[-1].detach().contiguous().view(torch.int64).squeeze(1),
    )


def own_rows(local: Embeddings, collectives: Collectives) -> slice:
    """Where the rows of this rank's table are in everyone's."""
    b = len(local.ids)
    return slice(collectives.rank * b, (collectives.rank + 1) * b)


def refuse_other_ranks(local: Embeddings, gathered: Embeddings, collectives: Collectives) -> None:
    """ValueError where two tables are not this rank's and everyone's of these ranks."""
    if len(gathered.ids) != collectives.size * len(local.ids):
        raise ValueError(
            f"the gathered table has {len(gathered.ids)} rows and this rank's {len(local.ids)}, but the objective was "
            f"built for {collectives.size} rank(s); build it with the collectives that gather the tables"
        )

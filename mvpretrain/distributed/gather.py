"""One packed gather for whole tables of embeddings, and means over the batch that it gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.types import Embeddings


def gather_embeddings(
    local: Embeddings, collectives: Collectives, gathers: Callable[[int, int], bool] | None = None
) -> tuple[Embeddings, Embeddings]:
    """(this rank's table, the table of all ranks) by one gather of one packed tensor.

    Ranks may bring unequal numbers of rows: short tables are padded with rows that are absent in every view, so that
    the lengths of both tables say how many ranks there are. Integers travel as bit patterns in columns of z's type.
    Where `gathers(rows a rank, dim)` is False (see `types.ChoosesGather`), the gathered table comes without z.
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
    """Where the rows of this rank's table are in the gathered one."""
    b = len(local.ids)
    return slice(collectives.rank * b, (collectives.rank + 1) * b)


def refuse_other_ranks(local: Embeddings, gathered: Embeddings, collectives: Collectives) -> None:
    """ValueError: the tables are not one rank's and the one gathered by these collectives."""
    if len(gathered.ids) != collectives.size * len(local.ids):
        raise ValueError(
            f"the gathered table has {len(gathered.ids)} rows and this rank's {len(local.ids)}, but the objective was "
            f"built for {collectives.size} rank(s); build it with the collectives that gather the tables"
        )


class BatchMean(NamedTuple):
    """A mean over the rows of every rank that count, as a sum over this rank's rows: the ranks' average is the mean.

    The divisor is the global number of rows that count, divided by the number of ranks; a mean over no rows is 0.
    """

    valid_rows: Tensor | int
    rows: int  # of this rank's table
    gathered_rows: int
    sharers: int = 1  # means over the same rows that share their weight

    @classmethod
    def over(
        cls, counts: Int[Tensor, "*v"] | int, local: Embeddings, gathered: Embeddings, sharers: int = 1
    ) -> BatchMean:
        """Over that many rows of all ranks, or over the sum of several such numbers."""
        count = max(counts, 1) if isinstance(counts, int) else counts.sum().clamp_min(1)
        return cls(count, len(local.ids), len(gathered.ids), sharers)

    def divisor(self, dtype: torch.dtype) -> Tensor | float:
        """Rounded once, in the type of what it divides: quotients of integers are float32, too coarse for float64."""
        count = self.valid_rows
        if isinstance(count, Tensor):
            count = count.to(dtype if dtype.is_floating_point else torch.float64)
        return count * self.rows / (self.gathered_rows * self.sharers)

    def __call__(self, values: Tensor, valid: Bool[Tensor, " b"] | None = None) -> Tensor:
        """The sum of the local rows' values, of the valid ones alone where given, over the divisor."""
        kept = values if valid is None else values.masked_fill(~valid, 0)
        return kept.sum() / self.divisor(kept.dtype)

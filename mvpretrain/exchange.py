"""What ranks tell each other: gather with a backward that sums, sums, and one packed gather for whole tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad

from mvpretrain.types import Embeddings


@runtime_checkable
class Exchange(Protocol):
    """The ranks that share one global batch."""

    rank: int
    size: int

    def gather(self, x: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
        """The rows of every rank, in rank order; every rank must bring equally many. Backward sums over ranks."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape; backward sums as well."""
        ...

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks of a tensor of one shape; no gradient."""
        ...

    def largest(self, count: int) -> int:
        """The largest of the ranks' integers."""
        ...

    def swap(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        """Send x to a rank and take what another sends, of the same shape; call the result to wait for it.

        The messages are under way while the caller works on, and x must not change meanwhile. No gradient.
        """
        ...


class Alone:
    """One process is the whole world."""

    rank, size = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return x

    def largest(self, count: int) -> int:
        return count

    def swap(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        return lambda: x


class Ranks:
    """The default process group of torch.distributed, which the engine has started."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # NCCL moves only GPU tensors, gloo's are on the CPU: the integers that we exchange must follow.
        self.device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x)  # type: ignore[return-value]

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x)  # type: ignore[return-value]

    def maximum(self, x: Tensor) -> Tensor:
        top = x.detach().clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return top

    def largest(self, count: int) -> int:
        return int(self.maximum(torch.tensor(count, device=self.device)))

    def swap(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        x, came = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        sent = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, came, source)])

        def wait() -> Tensor:
            for message in sent:
                message.wait()
            return came

        return wait


# Newer versions of torch warn of the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        every = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        _all_gather(every, x.contiguous())
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # A row is used by the objective of every rank, so its gradient is the sum of theirs: no 1/W here. The engine's
        # average over ranks is the only factor, and objectives return means, so that it is the right one.
        local = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        _reduce_scatter(local, grad.contiguous(), op=dist.ReduceOp.SUM)
        return local


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def share(
    local: Embeddings, exchange: Exchange, gathers: Callable[[int, int], bool] | None = None
) -> tuple[Embeddings, Embeddings]:
    """(this rank's table, everyone's) by one gather of one packed tensor.

    Ranks may bring unequal numbers of rows: short tables are padded with rows that are absent in every view, so that
    both tables tell the number of parts by their lengths. Integers travel as bit patterns in columns of z's type.
    Where `gathers(rows a rank, dim)` is False, everyone's table comes without z.
    """
    if exchange.size == 1:
        return local, local
    local = padded(local, exchange.largest(len(local.ids)))
    z = next(iter(local.z.values()))
    kind, views = z.dtype, list(local.z)
    names = views if gathers is None or gathers(*z.shape) else []
    columns = [local.z[v] for v in names]
    columns += [local.present[v].to(kind).unsqueeze(1) for v in views]
    columns += [local.ids.unsqueeze(1).view(kind), local.labels.unsqueeze(1).view(kind)]
    widths = [c.shape[1] for c in columns]
    every = exchange.gather(torch.cat(columns, dim=1)).split(widths, dim=1)
    k = len(names)
    return local, Embeddings(
        z=dict(zip(names, every[:k])),
        present={v: every[k + i].squeeze(1) > 0.5 for i, v in enumerate(views)},
        ids=every[-2].detach().contiguous().view(torch.int64).squeeze(1),
        labels=every[-1].detach().contiguous().view(torch.int64).squeeze(1),
    )


def own_rows(local: Embeddings, exchange: Exchange) -> slice:
    """Where the rows of this rank's table are in everyone's."""
    b = len(local.ids)
    return slice(exchange.rank * b, (exchange.rank + 1) * b)


def refuse_other_ranks(local: Embeddings, every: Embeddings, exchange: Exchange) -> None:
    """ValueError where two tables are not this rank's and everyone's of these ranks."""
    if len(every.ids) != exchange.size * len(local.ids):
        raise ValueError(
            f"everyone's table has {len(every.ids)} rows and this rank's {len(local.ids)}, but the objective was built "
            f"for {exchange.size} rank(s); build it with the exchange that shares the tables"
        )


def padded(table: Embeddings, rows: int) -> Embeddings:
    """The table with absent rows appended up to `rows`; their ids and labels are -1."""
    more = rows - len(table.ids)
    assert more >= 0, (len(table.ids), rows)
    if more == 0:
        return table
    return Embeddings(
        z={v: pad(z, (0, 0, 0, more)) for v, z in table.z.items()},
        present={v: pad(p, (0, more), value=False) for v, p in table.present.items()},
        ids=pad(table.ids, (0, more), value=-1),
        labels=pad(table.labels, (0, more), value=-1),
    )

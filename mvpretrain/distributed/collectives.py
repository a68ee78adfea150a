"""What objectives and engines send between ranks: gather, sum, maximum, send and receive; one class a way to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@runtime_checkable
class Collectives(Protocol):
    """The ranks that share one global batch. Every rank must make the same calls in the same order."""

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

    def send_recv(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        """Send x to the rank `to` and receive a tensor of its shape from `source`; call the result to wait for it.

        The messages are under way while the caller works on, and x must not change meanwhile. No gradient.
        """
        ...


class SingleProcess:
    """One process: nothing is sent."""

    rank, size = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return x

    def largest(self, count: int) -> int:
        return count

    def send_recv(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        return lambda: x


class ProcessGroup:
    """The default process group of torch.distributed, which the engine has started."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # NCCL moves only GPU tensors, gloo's are on the CPU: the integers of `largest` must follow.
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

    def send_recv(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        x, received = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        messages = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, received, source)])

        def wait() -> Tensor:
            for message in messages:
                message.wait()
            return received

        return wait


# Newer versions of torch warn of the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        _all_gather(gathered, x.contiguous())
        return gathered

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

"""Sums of a product of pairwise kernels over all axes but two: one matrix product, the other axes streamed.

A tensor of k axes that is a product over axes and pairs of axes,

    A[i_1, ..., i_k] = prod_u w_u[i_u] prod_{u<v} K_uv[i_u, i_v],

is never formed. For two axes a and b, let e run over the tuples of indices of all other axes (c, d, ...), and

    M[e, i] = prod_c K_ca[e_c, i]    N[e, j] = prod_c K_cb[e_c, j]    s[e] = prod_c w_c[e_c] prod_{c<d} K_cd[e_c, e_d].

Then the sum of A over the other axes is w_a o (K_ab o M^T diag(s) N) o w_b. M and N are made for one block of e at a
time: 2 n^k operations, nearly all of them in matrix products, and O(n^2 + block) memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import combinations
from math import prod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Block = tuple[slice, ...]
Tables = dict[tuple[int, int], Tensor]  # n_u n_v, by axes (u, v)


@runtime_checkable
class Arithmetic(Protocol):
    """How non-negative numbers are held, multiplied and summed: as they are, or by their logarithms."""

    zero: float

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of numbers."""
        ...

    def width(self, a: int, b: int) -> int:
        """How many numbers are held for each tuple e of the other axes, where axes of a and b elements remain."""
        ...

    def from_log(self, log: Tensor) -> Tensor:
        """Numbers from their logarithms."""
        ...

    def to_plain(self, x: Tensor) -> Tensor:
        """The numbers themselves; those asked for are at most the mass of the whole tensor."""
        ...

    def accumulate(self, table: Tensor, left: Tensor, right: Tensor) -> None:
        """table += left^T right, in place."""
        ...

    def apply(self, table: Tensor, w: Tensor) -> Tensor:
        """table w."""
        ...

    def pair_masses(self, left: Tensor, right: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        """left[e, i] core[i, j] right[e, j] summed over j (`e i`) and over i (`e j`), as plain numbers."""
        ...

    def log_sum_over_ranks(
        self, x: Tensor, total: Callable[[Tensor], Tensor], maximum: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The logarithm of the sum over ranks; `total` and `maximum` are those of a tensor over ranks."""
        ...


class Linear:
    """Numbers as they are: sums are matrix products. The product of everything must stay within the type's range."""

    zero = 0.0

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def width(self, a: int, b: int) -> int:
        return max(a, b)

    def from_log(self, log: Tensor) -> Tensor:
        return log.exp()

    def to_plain(self, x: Tensor) -> Tensor:
        return x

    def accumulate(self, table: Tensor, left: Tensor, right: Tensor) -> None:
        table.addmm_(left.T, right)

    def apply(self, table: Tensor, w: Tensor) -> Tensor:
        return table @ w

    def pair_masses(self, left: Tensor, right: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        return (right @ core.T).mul_(left), (left @ core).mul_(right)

    def log_sum_over_ranks(
        self, x: Tensor, total: Callable[[Tensor], Tensor], maximum: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return total(x).log()


class Logarithmic:
    """Numbers by their logarithms: any range, and an exponential for each of n^k terms."""

    zero = -torch.inf

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def width(self, a: int, b: int) -> int:
        return a * b

    def from_log(self, log: Tensor) -> Tensor:
        return log

    def to_plain(self, x: Tensor) -> Tensor:
        return x.exp()

    def accumulate(self, table: Tensor, left: Tensor, right: Tensor) -> None:
        if len(left):
            torch.logaddexp(table, (left[:, :, None] + right[:, None, :]).logsumexp(0), out=table)

    def apply(self, table: Tensor, w: Tensor) -> Tensor:
        return (table + w).logsumexp(1)

    def pair_masses(self, left: Tensor, right: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        # Every term is the mass of one tuple: no exponential of these is large.
        terms = (left[:, :, None] + right[:, None, :]).add_(core).exp_()
        return terms.sum(2), terms.sum(1)

    def log_sum_over_ranks(
        self, x: Tensor, total: Callable[[Tensor], Tensor], maximum: Callable[[Tensor], Tensor]
    ) -> Tensor:
        top = maximum(x)
        return total((x - top).exp()).log() + top


class Network:
    """A tensor of k axes and its contractions; kernels come by pair (u, v), u < v, as the arithmetic holds them.

    `block` is how many elements a block of M or N may have (in logarithms: its n_a n_b terms for each e); it is raised
    to those of the largest kernel.
    """

    def __init__(self, kernels: Tables, arithmetic: Arithmetic, block: int):
        self.arithmetic, self.kernels = arithmetic, with_transposes(kernels)
        self.axes = range(1 + max(v for _, v in kernels))
        if len(self.axes) > 3:  # their rows are repeated and multiplied many times over: they should lie together
            self.kernels = {pair: kernel.contiguous() for pair, kernel in self.kernels.items()}
        self.sizes = [len(self.kernels[u, (u + 1) % len(self.axes)]) for u in self.axes]
        self.block = max(block, *(kernel.numel() for kernel in kernels.values()))

    def contract(self, w: Sequence[Tensor], a: int, b: int) -> Float[Tensor, "a b"]:
        """The sum over all axes but a and b, without w_a and w_b."""
        kernel = self.kernels[a, b]
        if len(self.axes) == 2:
            return kernel
        table = torch.full_like(kernel, self.arithmetic.zero)
        for block in self._blocks(a, b):
            self.arithmetic.accumulate(table, *self._sides(w, a, b, block))
        return self.arithmetic.times(table, kernel)

    def pairs(self, w: Sequence[Tensor], a: int, b: int, table: Float[Tensor, "a b"]) -> Tables:
        """The sums over all axes but two, for each two, as plain numbers; `table` is `contract(w, a, b)`.

        For any k, two more matrix products of a contraction's size: they give the masses of all (e, i) and (e, j).
        """
        times = self.arithmetic.times
        masses = {(u, v): torch.zeros_like(self.kernels[u, v]) for u, v in combinations(self.axes, 2)}
        into = with_transposes(masses)
        into[a, b].copy_(self.arithmetic.to_plain(times(times(w[a][:, None], table), w[b])))
        core = times(times(w[a][:, None], self.kernels[a, b]), w[b])
        for block in self._blocks(a, b):
            with_a, with_b = self.arithmetic.pair_masses(*self._sides(w, a, b, block), core)
            shape = [s.stop - s.start for s in block]
            of_e = with_a.sum(1).reshape(shape)
            with_a, with_b = with_a.reshape(*shape, -1), with_b.reshape(*shape, -1)
            dims = list(enumerate(self._others(a, b)))
            for p, c in dims:
                rest = [q for q, _ in dims if q != p]
                into[c, a][block[p]] += _sum(with_a, rest)
                into[c, b][block[p]] += _sum(with_b, rest)
            for (p, c), (q, d) in combinations(dims, 2):
                into[c, d][block[p], block[q]] += _sum(of_e, [r for r, _ in dims if r not in (p, q)])
        return masses

    def _others(self, a: int, b: int) -> list[int]:
        return [c for c in self.axes if c not in (a, b)]

    def _blocks(self, a: int, b: int) -> Iterator[Block]:
        """Blocks of e, none where only a and b are."""
        others = [self.sizes[c] for c in self._others(a, b)]
        width = self.arithmetic.width(self.sizes[a], self.sizes[b])
        return blocks(others, max(1, self.block // max(1, width))) if others else iter(())

    def _sides(self, w: Sequence[Tensor], a: int, b: int, block: Block) -> tuple[Tensor, Tensor]:
        """M (`e a`) and diag(s) N (`e b`) of a block."""
        others, times = self._others(a, b), self.arithmetic.times
        count = len(others)
        factors = [_broadcast(w[c][at], [p], count) for p, (c, at) in enumerate(zip(others, block))]
        for (p, c), (q, d) in combinations(enumerate(others), 2):
            factors.append(_broadcast(self.kernels[c, d][block[p], block[q]], [p, q], count))
        return self._side(a, others, block), times(self._side(b, others, block), reduce(times, factors).reshape(-1, 1))

    def _side(self, x: int, others: list[int], block: Block) -> Tensor:
        count = len(others)
        rows = [
            _broadcast(self.kernels[c, x][at], [p, count], count + 1) for p, (c, at) in enumerate(zip(others, block))
        ]
        return reduce(self.arithmetic.times, rows).flatten(0, -2)


def with_transposes(tables: Tables) -> Tables:
    """The tables and their transposes, as views."""
    return tables | {(v, u): table.T for (u, v), table in tables.items()}


def blocks(sizes: Sequence[int], most: int) -> Iterator[Block]:
    """Boxes of at most `most` cells that fill a box: leading axes by one index, one axis in slices, the rest whole."""
    whole = tuple(slice(0, n) for n in sizes[1:])
    tail = prod(sizes[1:])
    if tail <= most:
        step = max(1, most // max(1, tail))
        yield from ((slice(at, min(at + step, sizes[0])), *whole) for at in range(0, sizes[0], step))
    else:
        yield from ((slice(i, i + 1), *rest) for i in range(sizes[0]) for rest in blocks(sizes[1:], most))


def _broadcast(x: Tensor, dims: Sequence[int], count: int) -> Tensor:
    """x with its axes as these of `count` dimensions, and one element along the others."""
    return x[tuple(slice(None) if p in dims else None for p in range(count))]


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return x.sum(axes) if axes else x  # torch sums over everything where no axis is named

"""Entropic multi-marginal optimal transport for costs that are sums over pairs of axes, without n^k numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mvpretrain.transport.contraction import Arithmetic, Linear, Logarithmic, Network, Tables

# The most that the ranges of the costs may sum to, in units of epsilon, for products of kernels and scalings to stay
# within e^+-87 (float32) and e^+-708 (float64). Costs are centred; a potential varies no more than the costs of its
# axis, all of them together by twice the costs: 2.5 times the range at most.
MAX_RANGE = {torch.float32: 35.0, torch.float64: 280.0}
BLOCK = {"cpu": 2**16, "cuda": 2**24}  # elements: near the cores of a CPU, enough to keep a GPU busy

OverRanks = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """The plan P = exp((f_1[i_1] + ... + f_k[i_k] - C[i_1 ... i_k]) / epsilon), by what is known of it."""

    potentials: list[Tensor]  # f_u, n_u; -inf where the marginal is 0
    pairs: list[Tensor]  # P_uv, n_u n_v, in the order of the costs
    value: Tensor  # sum_u <a_u, f_u>
    sweeps: float  # updates / k
    error: Tensor  # sum_u |P_u - a_u|_1


def single_process(x: Tensor) -> Tensor:
    """The sum and the maximum over ranks where there is one process."""
    return x


@torch.no_grad()
def solve(
    costs: Sequence[Float[Tensor, "_ _"]],
    epsilon: float,
    marginals: Sequence[Float[Tensor, " _"]],
    tolerance: float = 1e-3,
    max_updates: int = 300,
    total: OverRanks = single_process,
    maximum: OverRanks = single_process,
    block: int | None = None,
) -> Solution:
    """min <P, C> + epsilon sum P log P over P >= 0 with these marginals, C[i_1 ... i_k] = sum_{u<v} C_uv[i_u, i_v].

    `costs` come in the order (0, 1), (0, 2), ..., (k - 2, k - 1), each `n_u n_v`; the marginals, `n_u`, have one sum
    and may hold zeros. Sinkhorn's updates f_u += epsilon log(a_u / P_u) for u = 0, 1, ..., k - 1, 0, ... (Algorithm 1
    of Piran et al., ICML 2024) run until the L1 errors that the k updates of a sweep meet sum to the tolerance, or
    `max_updates` are spent. One contraction serves two updates, and two more give all pairs of the plan: 2 n^k
    (updates / 2 + 2) operations, O(n^2 + block) memory. No graph is kept; d value / d C_uv = P_uv (Danskin). `value`
    is the dual's: never above the minimum, and off by the square of the error.

    Where sum_{u<v} (max C_uv - min C_uv) <= 35 epsilon (float32) or 280 epsilon (float64), sums are matrix products in
    the costs' type; else in float64 where that suffices; else in float64 logarithms, n^k exponentials a contraction.

    Axis 0 may be one rank's rows of a whole, none included: its rows of the costs and of the marginal. `total` and
    `maximum` then are the sum and the maximum of a tensor over ranks, and an update sums one of n_u numbers. P_uv is
    this rank's rows for u = 0 and its part of the sum for others; potentials but the first, value, sweeps and error
    are the same on every rank.
    """
    pairs = _checked(costs, marginals)
    arithmetic, dtype = choose_arithmetic(costs, epsilon, maximum)
    centres = [(c.amin() + c.amax()) / 2 if c.numel() else c.new_zeros(()) for c in costs]
    kernels = {p: arithmetic.from_log(((m - c) / epsilon).to(dtype)) for p, m, c in zip(pairs, centres, costs)}
    network = Network(kernels, arithmetic, block or BLOCK.get(costs[0].device.type, BLOCK["cpu"]))
    given = [a.to(dtype) for a in marginals]
    logs, plan, updates = _iterate(network, given, tolerance, max_updates, total, maximum)
    found = [plan[p].to(costs[0].dtype) for p in pairs]
    potentials = [epsilon * log.to(costs[0].dtype) for log in logs]
    for (u, _), centre in zip(pairs, centres):
        potentials[u] += centre
    ends = [torch.where(a > 0, a * f, 0).sum() for a, f in zip(marginals, potentials)]
    value = total(ends[0]) + torch.stack(ends[1:]).sum()
    return Solution(potentials, found, value, updates / len(marginals), _error(found, marginals, total))


def choose_arithmetic(
    costs: Sequence[Tensor], epsilon: float, maximum: OverRanks = single_process
) -> tuple[Arithmetic, torch.dtype]:
    """(how to hold exp(-C / epsilon), in which type): the cheapest that can; the same on every rank."""
    dtype = costs[0].dtype
    ranges = [c.amax() - c.amin() for c in costs if c.numel()]
    cost_range = float(maximum(torch.stack(ranges).sum() if ranges else costs[0].new_zeros(()))) / epsilon
    for candidate in (dtype, torch.float64):
        if cost_range <= MAX_RANGE[candidate]:
            return Linear(), candidate
    return Logarithmic(), torch.float64


def _checked(costs: Sequence[Tensor], marginals: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The pairs of axes. ValueError: costs that do not fit the marginals."""
    pairs = list(combinations(range(len(marginals)), 2))
    found, lengths = [tuple(c.shape) for c in costs], [len(a) for a in marginals]
    if not pairs or found != [(lengths[u], lengths[v]) for u, v in pairs]:
        raise ValueError(
            f"costs of shapes {found} do not fit marginals of lengths {lengths}; give one matrix for each pair of "
            f"axes, n_u x n_v, in the order {pairs}"
        )
    return pairs


def _iterate(
    network: Network,
    marginals: Sequence[Tensor],
    tolerance: float,
    max_updates: int,
    total: OverRanks,
    maximum: OverRanks,
) -> tuple[list[Tensor], Tables, int]:
    """Sinkhorn's updates: (potentials / epsilon, pairs of the plan, number of updates)."""
    k, arithmetic = len(marginals), network.arithmetic
    wanted = [a.log() for a in marginals]
    logs, w = list(wanted), [arithmetic.from_log(a) for a in wanted]
    a = b = update = 0
    table = own = shared = marginals[0].new_zeros(())
    while update < max_updates:
        axis = update % k
        if update % 2 == 0:  # the sum over all other axes holds until one of those is updated
            a, b = axis, (axis + 1) % k
            table = network.contract(w, a, b)
        sums = arithmetic.apply(table, w[b]) if axis == a else arithmetic.apply(table.T, w[a])
        # Axis 0 is this rank's own: its rows meet every row of the other axes here.
        over_ranks = (total, maximum) if axis else (single_process, single_process)
        log = arithmetic.log_sum_over_ranks(sums, *over_ranks)
        missed = ((logs[axis] + log).exp() - marginals[axis]).abs().sum()
        own, shared = (own, shared + missed) if axis else (missed, torch.zeros_like(missed))
        logs[axis] = wanted[axis] - log
        w[axis] = arithmetic.from_log(logs[axis])
        update += 1
        if axis == k - 1 and float(total(own) + shared) <= tolerance:
            break
    return logs, network.pairs(w, a, b, table), update


def _error(pairs: Sequence[Tensor], marginals: Sequence[Tensor], total: OverRanks) -> Tensor:
    """sum_u |P_u - a_u|_1."""
    own = (pairs[0].sum(1) - marginals[0]).abs().sum()
    # The first k - 1 pairs are axis 0 with each other one.
    found = total(torch.cat([own[None], *(pair.sum(0) for pair in pairs[: len(marginals) - 1])]))
    return found[0] + (found[1:] - torch.cat(list(marginals[1:]))).abs().sum()

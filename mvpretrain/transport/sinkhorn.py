"""Entropic multi-marginal optimal transport for costs that are sums over pairs of axes, without n^k numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mvpretrain.transport import newton
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
    value: Tensor  # the dual's, sum_u <a_u, f_u> - epsilon (sum P - 1): never above the minimum
    updates: int  # of Sinkhorn's
    steps: int  # of Newton's method
    error: Tensor  # sum_u |P_u - a_u|_1
    distance: Tensor  # an estimate of the L1 distance of P from the converged plan
    scale: Tensor  # what it is compared with
    converged: bool  # whether that is within what was asked for


def single_process(x: Tensor) -> Tensor:
    """The sum and the maximum over ranks where there is one process."""
    return x


def whole(pairs: Tables) -> Tensor:
    """What `solve` compares the plan's distance with where nothing else is given: the plan's whole mass."""
    return next(iter(pairs.values())).new_ones(())


@torch.no_grad()
def solve(
    costs: Sequence[Float[Tensor, "_ _"]],
    epsilon: float,
    marginals: Sequence[Float[Tensor, " _"]],
    tolerance: float = 1e-3,
    max_steps: int = 50,
    updates: int | None = None,
    scale: Callable[[Tables], Tensor] = whole,
    total: OverRanks = single_process,
    maximum: OverRanks = single_process,
    block: int | None = None,
) -> Solution:
    """min <P, C> + epsilon sum P log P over P >= 0 with these marginals, C[i_1 ... i_k] = sum_{u<v} C_uv[i_u, i_v].

    `costs` come in the order (0, 1), (0, 2), ..., (k - 2, k - 1), each `n_u n_v`; the marginals, `n_u`, have one sum
    and may hold zeros. First some of Sinkhorn's updates f_u += epsilon log(a_u / P_u), u = 0, ..., k - 1, 0, ...
    (Algorithm 1 of Piran et al., ICML 2024; two sweeps by default), which do the most where the plan is soft; then
    damped Newton steps (`newton.maximise`), which need hardly more where it is sharp, until the plan's L1 distance from
    the converged one is estimated to be at most `tolerance` times `scale(pairs of the plan)`, or `max_steps` are taken.
    2 n^k operations a contraction: half of one for each update, three for a Newton step; O(k^2 n^2 + block) memory. No
    graph is kept; d value / d C_uv = P_uv (Danskin).

    Where sum_{u<v} (max C_uv - min C_uv) <= 35 epsilon (float32) or 280 epsilon (float64), sums are matrix products in
    the costs' type; else in float64 where that suffices; else in float64 logarithms, n^k exponentials a contraction.

    Axis 0 may be one rank's rows of a whole, none included: its rows of the costs and of the marginal. `total` and
    `maximum` then are the sum and the maximum of a tensor over ranks, and an update sums one of n_u numbers, a product
    with the Hessian one of n_1 + ... + n_{k-1}. P_uv is this rank's rows for u = 0 and its part of the sum for others;
    all but the first potential is the same on every rank.
    """
    pairs = _checked(costs, marginals)
    arithmetic, dtype = choose_arithmetic(costs, epsilon, maximum)
    centres = [(c.amin() + c.amax()) / 2 if c.numel() else c.new_zeros(()) for c in costs]
    kernels = {p: arithmetic.from_log(((m - c) / epsilon).to(dtype)) for p, m, c in zip(pairs, centres, costs)}
    network = Network(kernels, arithmetic, block or BLOCK.get(costs[0].device.type, BLOCK["cpu"]))
    given = [a.to(dtype) for a in marginals]
    updates = 2 * len(marginals) if updates is None else updates
    run = partial(_updated, network, given, total=total, maximum=maximum)
    logs = run(updates, [a.log() for a in given])
    sweep = partial(run, len(given))
    found = newton.maximise(network, logs, given, tolerance, scale, sweep, max_steps, total, maximum)
    tables = [found.plan[p].to(costs[0].dtype) for p in pairs]
    potentials = [epsilon * log.to(costs[0].dtype) for log in found.logs]
    for (u, _), centre in zip(pairs, centres):
        potentials[u] += centre
    ends = [torch.where(a > 0, a * f, 0).sum() for a, f in zip(marginals, potentials)]
    ends[0] = ends[0] - epsilon * (tables[0].sum() - marginals[0].sum())
    value = total(ends[0]) + torch.stack(ends[1:]).sum()
    error = _error(tables, marginals, total)
    distance, size = (x.to(costs[0].dtype) for x in (found.distance, found.scale))
    return Solution(potentials, tables, value, updates, found.steps, error, distance, size, found.converged)


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


def _updated(
    network: Network,
    marginals: Sequence[Tensor],
    updates: int,
    logs: Sequence[Tensor],
    total: OverRanks,
    maximum: OverRanks,
) -> list[Tensor]:
    """Potentials / epsilon after so many of Sinkhorn's updates from `logs`."""
    k, arithmetic = len(marginals), network.arithmetic
    wanted = [a.log() for a in marginals]
    logs, w = list(logs), [arithmetic.from_log(log) for log in logs]
    a = b = 0
    table = marginals[0].new_zeros(())
    for update in range(updates):
        axis = update % k
        if update % 2 == 0:  # the sum over all other axes holds until one of those is updated
            a, b = axis, (axis + 1) % k
            table = network.contract(w, a, b)
        sums = arithmetic.apply(table, w[b]) if axis == a else arithmetic.apply(table.T, w[a])
        # Axis 0 is this rank's own: its rows meet every row of the other axes here.
        over_ranks = (total, maximum) if axis else (single_process, single_process)
        log = arithmetic.log_sum_over_ranks(sums, *over_ranks)
        logs[axis] = wanted[axis] - log
        w[axis] = arithmetic.from_log(logs[axis])
    return logs


def _error(pairs: Sequence[Tensor], marginals: Sequence[Tensor], total: OverRanks) -> Tensor:
    """sum_u |P_u - a_u|_1."""
    own = (pairs[0].sum(1) - marginals[0]).abs().sum()
    # The first k - 1 pairs are axis 0 with each other one.
    found = total(torch.cat([own[None], *(pair.sum(0) for pair in pairs[: len(marginals) - 1])]))
    return found[0] + (found[1:] - torch.cat(list(marginals[1:]))).abs().sum()

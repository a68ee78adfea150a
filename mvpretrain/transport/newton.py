"""Newton's method on the dual of entropic multi-marginal transport: exact where Sinkhorn's sweeps have hardly begun.

In units of epsilon, with g_u = f_u / epsilon, the plan is P = exp(sum_u g_u - C / epsilon), and the dual

    D(g) = sum_u <a_u, g_u> - sum P

is concave, with gradient r_u = a_u - P_u and Hessian -H, H_uu = diag(P_u) and H_uv = P_uv: the plan's marginals on
pairs of axes, which the network of kernels gives for two contractions more. A step solves H d = r by conjugate
gradients, preconditioned by the diagonal. H is singular along the k - 1 directions that add a constant to one axis and
take it from another; r is orthogonal to them, and conjugate gradients stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mvpretrain.transport.contraction import Network, Tables

LONGEST = 3.0  # the most that a step moves a potential, in units of epsilon: beyond, the quadratic model says little
ENOUGH = 0.1  # of the residual that conjugate gradients leave far from the solution
MAX_PRODUCTS = 200  # of the Hessian with a vector in one solve
MAX_HALVINGS = 30
ROUNDING = 4.0  # units in the last place of a whole plan, for each axis

OverRanks = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """A Newton step, and what it says of the plan that it starts from."""

    direction: list[Tensor]  # d_u, n_u
    decrement: Tensor  # <r, d>: twice the missing part of the dual, to second order
    products: int  # of the Hessian with a vector


class Found(NamedTuple):
    """Where the iterations ended."""

    logs: list[Tensor]  # potentials / epsilon
    plan: Tables
    steps: int
    distance: Tensor  # an estimate of the L1 distance of the plan from the converged one
    scale: Tensor  # what it is compared with
    converged: bool


@torch.no_grad()
def maximise(
    network: Network,
    logs: Sequence[Tensor],
    marginals: Sequence[Tensor],
    tolerance: float,
    scale: Callable[[Tables], Tensor],
    sweep: Callable[[Sequence[Tensor]], list[Tensor]],
    max_steps: int,
    total: OverRanks,
    maximum: OverRanks,
) -> Found:
    """Damped Newton steps from `logs` until the plan's distance is at most `tolerance scale(plan)`, or `max_steps`.

    It also ends where the plan's sums differ from the marginals by no more than rounding. Where rounding leaves no step
    to be taken, `sweep` is, which is safe from it.

    By Pinsker's inequality a plan whose dual value misses the maximum by delta (in units of epsilon) is at most
    sqrt(2 delta) from the converged one in L1; delta is half the Newton decrement to second order. A step is as long as
    LONGEST allows, and halved until the dual value has its maximum along it not far behind: the slope at its end may be
    negative by half of what it was. Axis 0 may be one rank's rows of a whole; every rank gets the same steps. Cost of a
    step: three contractions of 2 n^k operations, and some dozens of products with the Hessian, k^2 n^2 each. Memory:
    O(k^2 n^2).
    """
    current = [log.clone() for log in logs]
    plan, sums = _tables(network, current, total)
    steps = 0
    while True:
        step = newton_step(plan, sums, marginals, total)
        gaps = _totals([(a - x).abs() for a, x in zip(marginals, sums)], total)
        # Below, the sums of a plan are rounding, and steps that follow it drift.
        rounding = ROUNDING * torch.finfo(logs[0].dtype).eps * len(gaps)
        # Rounding may make the Hessian indefinite along what hardly moves the plan: then the step says nothing.
        sound = float(step.decrement) >= 0
        distance, size = step.decrement.sqrt() if sound else gaps.sum(), scale(plan)
        converged = float(gaps.sum()) <= rounding or (sound and float(distance) <= tolerance * float(size))
        if converged or steps >= max_steps:
            return Found(current, plan, steps, distance, size, converged)
        moved = _searched(network, current, sums, marginals, step, total, maximum) if sound else None
        if moved is None:
            current = sweep(current)
            moved = current, *_tables(network, current, total)
        current, plan, sums = moved
        steps += 1


def newton_step(
    plan: Tables, sums: Sequence[Tensor], marginals: Sequence[Float[Tensor, " _"]], total: OverRanks
) -> Step:
    """H d = r by conjugate gradients on the tables of pairs, in float64; entries without mass stay where they are."""
    marginals = [a.double() for a in marginals]
    n0, lengths = len(sums[0]), [len(s) for s in sums]
    scale = torch.cat([torch.where((a > 0) & (s > 0), s, torch.inf) for a, s in zip(marginals, sums)]).rsqrt()
    residual = torch.cat(_level([a - s for a, s in zip(marginals, sums)], sums, total)).mul_(scale)
    matrix = _coupling(plan, lengths, scale)

    dot = partial(product, own=n0, total=total)

    def hessian(x: Tensor) -> tuple[Tensor, Tensor]:
        """(H x, <x, H x>), scaled, by one message."""
        part = matrix @ x
        dots = torch.stack([x @ part, x[:n0] @ x[:n0], x[n0:] @ x[n0:], x.new_ones(())])
        shared, (mixed, mine, others, ranks) = total(torch.cat([part[n0:], dots])).tensor_split([-4])
        return torch.cat([part[:n0], shared]).add_(x), mixed + mine + others / ranks

    x, p, rest = torch.zeros_like(residual), residual.clone(), residual.clone()
    size = first = dot(rest, rest)
    # As the solution comes near, so must the directions: the residual is the part of a step that is still to go.
    target = min(ENOUGH, float(first) ** 0.25) ** 2 * float(first)
    products = 0
    while products < MAX_PRODUCTS and float(size) > target:
        image, curvature = hessian(p)
        if float(curvature) <= 0:  # only by rounding, along the gauge
            break
        length = size / curvature
        x.addcmul_(p, length)
        rest.addcmul_(image, length, value=-1)
        size, before = dot(rest, rest), size
        p.mul_(size / before).add_(rest)
        products += 1
    decrement = dot(residual, x)
    direction = list((x * scale).split(lengths))
    means = _totals([d * s for d, s in zip(direction, sums)], total) / _totals(sums, total)
    for d, mean in zip(direction[1:], means[1:]):  # as the gauge leaves free: else rounding drifts along it
        d -= mean
    direction[0] += means[1:].sum()
    return Step(direction, decrement, products)


def _level(gaps: Sequence[Tensor], sums: Sequence[Tensor], total: OverRanks) -> list[Tensor]:
    """The gaps with one sum for all axes, as they have but for rounding: the Hessian answers no other part of them."""
    totals, masses = _totals(gaps, total), _totals(sums, total)
    return [gap - s * ((t - totals.mean()) / m) for gap, s, t, m in zip(gaps, sums, totals, masses)]


def _totals(tables: Sequence[Tensor], total: OverRanks) -> Tensor:
    """The sum of each axis, the same on all ranks; axis 0 is cut among them, the others are on each."""
    *found, ranks = total(torch.stack([*(x.sum() for x in tables), tables[0].new_ones(())]))
    return torch.stack([found[0], *(x / ranks for x in found[1:])])


def product(x: Tensor, y: Tensor, own: int, total: OverRanks) -> Tensor:
    """<x, y> of vectors whose first numbers are this rank's and whose others are every rank's, the same on all ranks.

    The others' sum is taken on every rank and averaged: its rounding depends on how a rank's memory lies, and ranks
    that disagree on a number stop at different times.
    """
    mine, shared, ranks = total(torch.stack([x[:own] @ y[:own], x[own:] @ y[own:], x.new_ones(())]))
    return mine + shared / ranks


def _coupling(plan: Tables, lengths: Sequence[int], scale: Tensor) -> Tensor:
    """The Hessian but for its diagonal, scaled by `scale` on both sides, as one matrix."""
    size, ends = sum(lengths), [sum(lengths[: u + 1]) for u in range(len(lengths))]
    at = [slice(end - n, end) for end, n in zip(ends, lengths)]
    matrix = scale.new_zeros(size, size)
    for (u, v), table in plan.items():
        block = table.double() * scale[at[u], None] * scale[at[v]]
        matrix[at[u], at[v]] = block
        matrix[at[v], at[u]] = block.T
    return matrix


def _searched(
    network: Network,
    logs: Sequence[Tensor],
    sums: Sequence[Tensor],
    marginals: Sequence[Tensor],
    step: Step,
    total: OverRanks,
    maximum: OverRanks,
) -> tuple[list[Tensor], Tables, list[Tensor]] | None:
    """(potentials, plan, its sums over axes) after a step that is short enough; None where no length is."""
    n0 = len(step.direction[0])
    flat = torch.cat(step.direction)
    longest = float(maximum(flat.abs().amax()))
    length = min(1.0, LONGEST / longest) if longest > 0 else 1.0
    gap = torch.cat(list(marginals)) - torch.cat(list(sums))
    before = float(product(gap, gap, n0, total))
    for _ in range(MAX_HALVINGS):
        tried = [log + (length * d).to(log.dtype) for log, d in zip(logs, step.direction)]
        plan, reached = _tables(network, tried, total)
        left = torch.cat(list(marginals)) - torch.cat(reached)
        slope = float(product(left, flat, n0, total))
        # Both are False where the plan overflowed. The second holds near the end, where slopes are lost in rounding.
        if slope >= -0.5 * float(step.decrement) or float(product(left, left, n0, total)) < 0.25 * before:
            return tried, plan, reached
        length /= 2
    return None


def _tables(network: Network, logs: Sequence[Tensor], total: OverRanks) -> tuple[Tables, list[Tensor]]:
    """(marginals of the plan on pairs of axes, and on axes)."""
    w = [network.arithmetic.from_log(log) for log in logs]
    plan = network.pairs(w, 0, 1, network.contract(w, 0, 1))
    # In float64: the Hessian's diagonal and the rest of it must fit together better than a float32 can say.
    wide = torch.float64
    shared = total(torch.cat([plan[0, v].sum(0, dtype=wide) for v in range(1, len(logs))]))
    return plan, [plan[0, 1].sum(1, dtype=wide), *shared.split([len(log) for log in logs[1:]])]

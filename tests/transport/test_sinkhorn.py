"""Multi-marginal Sinkhorn against a dense log-domain one, InfoNCE, finite differences, and real ranks."""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mvpretrain.distributed.collectives import ProcessGroup
from mvpretrain.testing.tables import draw
from mvpretrain.transport import sinkhorn
from mvpretrain.transport.contraction import Linear, Logarithmic
from mvpretrain.transport.sinkhorn import choose_arithmetic, solve

SIZES = [(7, 5), (6, 6, 6), (3, 7, 5), (4, 5, 6, 3), (3, 4, 2, 5, 3), (2, 3, 2, 3, 2, 3)]
LINEAR, WIDER, LOGS = (Linear, torch.float32), (Linear, torch.float64), (Logarithmic, torch.float64)


class Problem(NamedTuple):
    costs: list[Tensor]
    marginals: list[Tensor]

    def float(self) -> Problem:
        return Problem([c.float() for c in self.costs], [a.float() for a in self.marginals])


def problem(sizes: tuple[int, ...], top: float = 1.0, seed: int = 0) -> Problem:
    """Costs between 0 and top in all, uneven marginals."""
    pairs = list(combinations(range(len(sizes)), 2))
    costs = [draw(seed + 10 * u + v, sizes[u], sizes[v]).sigmoid() * top / len(pairs) for u, v in pairs]
    return Problem(costs, [draw(seed + 90 + u, n).softmax(0) for u, n in enumerate(sizes)])


def placed(x: Tensor, axes: tuple[int, ...], k: int) -> Tensor:
    shape = [1] * k
    for axis, n in zip(axes, x.shape):
        shape[axis] = n
    return x.reshape(shape)


def tensor(costs: list[Tensor], k: int) -> Tensor:
    whole = torch.zeros([1] * k, dtype=torch.float64)
    for pair, c in zip(combinations(range(k), 2), costs):
        whole = whole + placed(c.double(), pair, k)
    return whole


def onto(plan: Tensor, *axes: int) -> Tensor:
    rest = [axis for axis in range(plan.ndim) if axis not in axes]
    return plan.sum(rest) if rest else plan


def dense(given: Problem, epsilon: float, sweeps: int = 20_000) -> tuple[Tensor, Tensor]:
    """(plan, dual value) by Sinkhorn on the whole tensor in logarithms, to rounding."""
    k = len(given.marginals)
    cost, marginals = tensor(given.costs, k), [a.double() for a in given.marginals]
    f = [epsilon * a.log() for a in marginals]
    for _ in range(sweeps):
        missed = 0.0
        for u, a in enumerate(marginals):
            log = (sum(placed(x, (v,), k) for v, x in enumerate(f)) - cost) / epsilon
            mass = log.logsumexp([v for v in range(k) if v != u])
            missed += float((mass.exp() - a).abs().sum())
            f[u] = f[u] + epsilon * (a.log() - mass)
        if missed < 1e-13:
            break
    plan = ((sum(placed(x, (v,), k) for v, x in enumerate(f)) - cost) / epsilon).exp()
    return plan, torch.stack([(a * x).sum() for a, x in zip(marginals, f)]).sum()


def plan_of(potentials: list[Tensor], costs: list[Tensor], epsilon: float) -> Tensor:
    k = len(potentials)
    exponent = -tensor(costs, k)
    for v, f in enumerate(potentials):
        exponent = exponent + placed(f.double(), (v,), k)
    return (exponent / epsilon).exp()


def assert_pairs(found: list[Tensor], plan: Tensor, tolerance: float) -> None:
    for pair, table in zip(combinations(range(plan.ndim), 2), found):
        torch.testing.assert_close(table.double(), onto(plan, *pair), rtol=tolerance, atol=tolerance)


def chosen(given: Problem, epsilon: float) -> tuple[type, torch.dtype]:
    arithmetic, dtype = choose_arithmetic(given.costs, epsilon)
    return type(arithmetic), dtype


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_the_dense_solution(sizes, epsilon):
    given = problem(sizes)
    plan, value = dense(given, epsilon)
    found = solve(*argued(given, epsilon), tolerance=1e-13, max_steps=200, block=11)
    torch.testing.assert_close(found.value, value, rtol=1e-10, atol=1e-12)
    primal = (plan * tensor(given.costs, plan.ndim)).sum() + epsilon * torch.xlogy(plan, plan).sum()
    torch.testing.assert_close(found.value, primal, rtol=1e-10, atol=1e-12)
    assert_pairs(found.pairs, plan, 1e-10)
    torch.testing.assert_close(plan_of(found.potentials, given.costs, epsilon), plan, rtol=1e-9, atol=1e-12)
    assert found.error < 1e-12


def argued(given: Problem, epsilon: float) -> tuple[list[Tensor], float, list[Tensor]]:
    return given.costs, epsilon, given.marginals


@pytest.mark.parametrize(("epsilon", "wanted"), [(0.05, LINEAR), (0.01, WIDER), (0.001, LOGS)])
@pytest.mark.parametrize("sizes", [(5, 6), (5, 4, 6), (4, 3, 4, 3)], ids=str)
def test_smaller_epsilons_go_to_wider_numbers_by_themselves(sizes, epsilon, wanted):
    given = problem(sizes, seed=2).float()
    assert chosen(given, epsilon) == wanted
    found = solve(*argued(given, epsilon), max_steps=0, updates=20 * len(sizes))
    assert found.value.dtype == torch.float32
    # Convergence takes thousands of sweeps at the smallest: the same number of sweeps leads to the same plan.
    plan, value = dense(given, epsilon, sweeps=20)
    torch.testing.assert_close(found.value.double(), value, rtol=1e-4, atol=0)
    assert_pairs(found.pairs, plan, 1e-4)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_tiny_epsilons_of_far_costs_stay_numbers(epsilon):
    # The best tuple of one row costs 1 more than those of others: plain kernels would be 0 there in any type.
    given = problem((5, 4, 6))
    given.costs[0][2] += 1
    found = solve(*argued(given, epsilon), max_steps=0, updates=3 * 20)
    assert chosen(given, epsilon) == LOGS
    for x in (*found.potentials, *found.pairs, found.value, found.error):
        assert x.isfinite().all()
    plan, value = dense(given, epsilon, 20)
    torch.testing.assert_close(found.value, value, rtol=1e-10, atol=0)
    assert_pairs(found.pairs, plan, 1e-8)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_float32_holds_to_the_edge_of_its_range(k):
    # Clusters at the ends of a line, so that every cost is 0 or the largest, at the smallest epsilon for float32.
    side = [(draw(u, 6) > 0).double() for u in range(k)]
    pairs = list(combinations(range(k), 2))
    given = Problem(
        [(side[u][:, None] - side[v]).abs() / len(pairs) for u, v in pairs],
        [draw(50 + u, 6).softmax(0) for u in range(k)],
    )
    epsilon = 1 / sinkhorn.MAX_RANGE[torch.float32] * (1 + 1e-6)
    assert chosen(given.float(), epsilon) == LINEAR
    found = solve(*argued(given.float(), epsilon), tolerance=1e-6, max_steps=200)
    plan, value = dense(given, epsilon)
    torch.testing.assert_close(found.value.double(), value, rtol=1e-4, atol=1e-6)
    assert_pairs(found.pairs, plan, 1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_is_right_to_four_digits(sizes):
    for epsilon in (0.05, 0.5):
        given = problem(sizes)
        plan, value = dense(given, epsilon)
        found = solve(*argued(given.float(), epsilon), tolerance=1e-6, max_steps=200)
        torch.testing.assert_close(found.value.double(), value, rtol=1e-4, atol=0)
        assert_pairs(found.pairs, plan, 1e-5)


def test_half_a_sweep_of_two_views_is_infonce():
    n, epsilon = 9, 0.1
    x, y = (normalize(draw(i, n, 5), dim=1) for i in range(2))
    cost, even = (1 - x @ y.T) / 2, torch.full((n,), 1 / n, dtype=torch.float64)
    found = solve([cost], epsilon, [even, even], max_steps=0, updates=1)
    assert found.updates == 1
    # With the entropy relative to even marginals, as InfoNCE has it.
    relative = found.value + 2 * epsilon * math.log(n)
    infonce = cross_entropy(x @ y.T / (2 * epsilon), torch.arange(n))
    torch.testing.assert_close((cost.diag().mean() - relative) / epsilon, infonce - math.log(n), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_rises_to_the_minimum_and_the_error_is_the_plans(sizes):
    given, epsilon = problem(sizes), 0.05
    plan, last = dense(given, epsilon)[1], -math.inf
    for updates in range(1, 2 * len(sizes) + 1):
        found = solve(*argued(given, epsilon), max_steps=0, updates=updates)
        assert found.updates == updates
        assert last - 1e-14 < found.value <= plan + 1e-14
        last = float(found.value)
        reached = plan_of(found.potentials, given.costs, epsilon)
        assert_pairs(found.pairs, reached, 1e-12)
        error = sum((onto(reached, u) - a).abs().sum() for u, a in enumerate(given.marginals))
        torch.testing.assert_close(found.error, error, rtol=1e-6, atol=1e-14)
        assert found.error > 1e-13


def test_pairs_are_the_gradient_of_the_value():
    given, epsilon, step = problem((3, 4, 2, 3)), 0.1, 1e-5
    found = solve(*argued(given, epsilon), tolerance=1e-13, max_steps=200)
    for index, cost in enumerate(given.costs):
        for at in [(0, 0), (cost.shape[0] - 1, 1)]:
            ends = []
            for sign in (1, -1):
                costs = [c.clone() for c in given.costs]
                costs[index][at] += sign * step
                ends.append(solve(costs, epsilon, given.marginals, tolerance=1e-13, max_steps=200).value)
            assert float(found.pairs[index][at]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 0.001])
def test_rows_of_no_mass_are_left_out(epsilon):
    given, pairs = problem((5, 4, 6), seed=1), list(combinations(range(3), 2))
    kept = [torch.tensor([0, 2, 3, 4]), torch.arange(4), torch.tensor([1, 2, 3, 5])]
    for a, rows in zip(given.marginals, kept):
        a[torch.ones_like(a, dtype=torch.bool).index_fill(0, rows, False)] = 0
        a /= a.sum()
    smaller = [c[kept[u]][:, kept[v]] for (u, v), c in zip(pairs, given.costs)]
    wanted = solve(smaller, epsilon, [a[r] for a, r in zip(given.marginals, kept)], 1e-12, 0, 30)
    found = solve(*argued(given, epsilon), 1e-12, 0, 30)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=0)
    assert found.potentials[0][1] == -math.inf and (found.pairs[0][1] == 0).all()
    for table, pair, (u, v) in zip(found.pairs, wanted.pairs, pairs):
        torch.testing.assert_close(table[kept[u]][:, kept[v]], pair, rtol=1e-8, atol=1e-14)


def test_keeps_no_graph():
    given = problem((4, 5, 3))
    found = solve([c.requires_grad_() for c in given.costs], 0.1, given.marginals)
    assert not any(x.requires_grad for x in (*found.potentials, *found.pairs, found.value, found.error))


@pytest.mark.parametrize(("costs", "lengths"), [([(3, 4), (3, 5)], (3, 4, 5)), ([(4, 3)], (3, 4)), ([], (3,))])
def test_costs_that_do_not_fit_are_refused(costs, lengths):
    with pytest.raises(ValueError, match=r"do not fit marginals of lengths .* give one matrix for each pair"):
        solve([torch.zeros(shape) for shape in costs], 0.1, [torch.full((n,), 1 / n) for n in lengths])


CUTS = {2: [0, 2, 7], 4: [0, 3, 3, 6, 7]}  # one of four has no row


def solve_part(
    rank: int, size: int, sizes: tuple[int, ...], epsilon: float, steps: int, updates: int
) -> sinkhorn.Solution:
    given, ranks = problem(sizes), ProcessGroup()
    rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
    costs = [c[rows] if u == 0 else c for (u, _), c in zip(combinations(range(len(sizes)), 2), given.costs)]
    marginals = [given.marginals[0][rows], *given.marginals[1:]]
    return solve(costs, epsilon, marginals, 1e-12, steps, updates, total=ranks.sum, maximum=ranks.maximum)


@pytest.mark.parametrize(("epsilon", "steps", "updates"), [(0.3, 20, 4), (0.02, 20, 8), (0.001, 0, 15)])
@pytest.mark.parametrize("sizes", [(7, 5), (7, 5, 6), (7, 3, 4, 5), (7, 2, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_axis_0_on_ranks_are_the_whole(ranks, size, sizes, epsilon, steps, updates):
    given, k = problem(sizes), len(sizes)
    wanted = solve(*argued(given, epsilon), 1e-12, steps, updates)
    parts = ranks(size).run(solve_part, size, sizes, epsilon, steps, updates)
    for part in parts:
        torch.testing.assert_close(part.value, wanted.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(part.potentials[1:], wanted.potentials[1:], rtol=1e-8, atol=1e-10)
        assert (part.updates, part.steps) == (wanted.updates, wanted.steps)
        assert float(part.error) == pytest.approx(float(wanted.error), rel=1e-3, abs=1e-13)
    for index, (u, _) in enumerate(combinations(range(k), 2)):
        tables = [part.pairs[index] for part in parts]
        found = torch.cat(tables) if u == 0 else torch.stack(tables).sum(dim=0)
        torch.testing.assert_close(found, wanted.pairs[index], rtol=1e-7, atol=1e-12)

"""Newton's method on embeddings that have been trained, where Sinkhorn's sweeps have hardly begun."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mvpretrain import objectives
from mvpretrain.distributed.collectives import ProcessGroup
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.objectives import m3g
from mvpretrain.transport import newton
from mvpretrain.transport.sinkhorn import solve
from mvpretrain.types import Embeddings
from tools.bench import convergence

DATA = Path(__file__).parents[3] / "shared/data/mfeat"


@cache
def trained() -> Tensor:
    """400 held-out digits through six trained linear towers: `6 400 32`."""
    if not DATA.is_dir():
        pytest.skip("the data set mfeat is not beside the repository")
    return convergence.trained(DATA, steps=300)


def table(k: int, n: int, dtype: torch.dtype = torch.float64) -> Embeddings:
    views = [f"view{i}" for i in range(k)]
    z = {v: x[:n].to(dtype).requires_grad_() for v, x in zip(views, trained())}
    present = dict.fromkeys(views, torch.ones(n, dtype=torch.bool))
    return Embeddings(z=z, ids=torch.arange(n), present=present, labels=torch.full((n,), -1))


def gradient(whole: Embeddings, **settings: float) -> tuple[Tensor, dict[str, Tensor]]:
    losses = objectives.build({"kind": "m3g", **settings}, list(whole.z))(whole, whole)
    found = torch.autograd.grad(losses.total, list(whole.z.values()))
    return torch.cat([g.double().flatten() for g in found]), losses.parts


def dense_gradient(whole: Embeddings, temperature: float) -> Tensor:
    """<J - P, dc> with P to rounding: Newton's method on the whole tensor in float64, each Hessian solved densely."""
    z = [x.detach().double() for x in whole.z.values()]
    k, n = len(z), len(z[0])
    shape = [[n if v == u else 1 for v in range(k)] for u in range(k)]
    energy = torch.zeros([n] * k, dtype=torch.float64)
    for u, v in combinations(range(k), 2):
        energy = energy + (z[u] @ z[v].T / temperature).reshape([n if w in (u, v) else 1 for w in range(k)])

    def plan_of(g: list[Tensor]) -> Tensor:
        return (energy + sum(x.reshape(s) for x, s in zip(g, shape))).exp()

    def onto(plan: Tensor, *axes: int) -> Tensor:
        return plan.sum([w for w in range(k) if w not in axes]) if k > len(axes) else plan

    g = [torch.zeros(n, dtype=torch.float64) for _ in range(k)]
    for _ in range(20):  # Sinkhorn, to be near
        for u in range(k):
            log = energy + sum(x.reshape(s) for x, s in zip(g, shape))
            g[u] = g[u] - np.log(n) - log.logsumexp([w for w in range(k) if w != u])
    missed, plan = 1.0, plan_of(g)
    for _ in range(100):
        sums = torch.cat([onto(plan, u) for u in range(k)])
        gap = 1 / n - sums
        missed = float(gap.abs().sum())
        if missed < 1e-13:
            break
        hessian = torch.diag(sums)
        for u, v in combinations(range(k), 2):
            pair = onto(plan, u, v)
            hessian[u * n : u * n + n, v * n : v * n + n] = pair
            hessian[v * n : v * n + n, u * n : u * n + n] = pair.T
        step = torch.linalg.lstsq(hessian, gap[:, None], driver="gelsd").solution[:, 0]
        length = min(1.0, 1.0 / float(step.abs().max()))
        g = [x + length * d for x, d in zip(g, step.split(n))]
        plan = plan_of(g)
    assert missed < 1e-11, missed
    found = [torch.zeros_like(x) for x in z]
    for u, v in combinations(range(k), 2):
        apart = onto(plan, u, v) - torch.eye(n, dtype=torch.float64) / n
        found[u] += 2 / k**2 * apart @ z[v]
        found[v] += 2 / k**2 * apart.T @ z[u]
    return torch.cat([x.flatten() for x in found])


CASES = [(2, 40, 0.05), (2, 40, 1.0), (3, 24, 0.05), (3, 24, 0.1), (3, 24, 1.0), (4, 10, 0.1), (4, 10, 0.2)]
CASES += [(5, 6, 0.1), (6, 5, 0.05), (6, 5, 0.2)]


@pytest.mark.parametrize(("k", "n", "temperature"), CASES)
def test_the_gradient_is_the_converged_one(k, n, temperature):
    whole = table(k, n)
    wanted = dense_gradient(whole, temperature)
    exact, _ = gradient(whole, temperature=temperature, tolerance=1e-12)
    # At the sharpest plans either side is as good as the Hessian's condition lets float64 be.
    assert float((exact - wanted).norm()) < 1e-10 * float(wanted.norm()) + (1e-8 if temperature < 0.1 else 1e-13)
    for dtype in (torch.float64, torch.float32):
        found, parts = gradient(table(k, n, dtype), temperature=temperature)
        error = float((found - wanted).norm() / wanted.norm())
        assert error < 0.01 and parts["unconverged"] == 0, (dtype, error)
        assert error < max(1.5 * float(parts["gradient_error"]), 1e-4), "the estimate is one from above"


def test_sweeps_alone_are_far_from_it_and_say_so():
    whole = table(4, 10)
    wanted = dense_gradient(whole, 0.1)
    found, parts = gradient(whole, temperature=0.1, max_steps=0)
    error = float((found - wanted).norm() / wanted.norm())
    assert error > 0.1 and parts["unconverged"] == 1 and parts["gradient_error"] > 0.1


def part(rank: int, size: int, z: Tensor, temperature: float, gaps: bool) -> tuple[Tensor, dict[str, float]]:
    m3g.SHARED = 0 if gaps else 2**22  # with it, ranks share the work on however few tuples
    rows = slice(rank * len(z[0]) // size, (rank + 1) * len(z[0]) // size)
    leaves = {f"view{i}": x[rows].clone().requires_grad_() for i, x in enumerate(z)}
    ids = torch.arange(len(z[0])).div(2, rounding_mode="floor")[rows] if gaps else torch.arange(len(z[0]))[rows]
    missing = torch.arange(len(z[0]))[rows] % 5 == 0
    present = {v: ~missing if gaps and v == "view1" else torch.ones(len(ids), dtype=torch.bool) for v in leaves}
    local = Embeddings(z=leaves, ids=ids, present=present, labels=torch.full((len(ids),), -1))
    group = ProcessGroup()
    objective = objectives.build({"kind": "m3g", "temperature": temperature, "tolerance": 1e-6}, list(leaves), group)
    losses = objective(*gather_embeddings(local, group))
    losses.total.backward()
    found = torch.stack([x.grad for x in leaves.values() if x.grad is not None]) / size
    return found, {name: float(value) for name, value in losses.parts.items()}


@pytest.mark.parametrize(
    ("k", "n", "temperature", "gaps"), [(3, 24, 0.1, False), (3, 24, 0.1, True), (4, 10, 0.2, True)]
)
def test_ranks_take_the_same_steps(ranks, k, n, temperature, gaps):
    z = trained()[:k, :n].double()
    (wanted, alone), *_ = ranks(1).run(part, 1, z, temperature, gaps)
    assert alone["newton_steps"] > 2
    for size in (2, 4):
        parts = ranks(size).run(part, size, z, temperature, gaps)
        found = torch.cat([g for g, _ in parts], dim=1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
        assert {p["newton_steps"] for _, p in parts} == {alone["newton_steps"]}


def test_steps_solve_the_hessian_and_leave_the_gauge():
    z = trained()[:3, :12].double()
    costs = [(1 - z[u] @ z[v].T) * 2 / 9 for u, v in combinations(range(3), 2)]
    even = [torch.full((12,), 1 / 12, dtype=torch.float64)] * 3
    rough = solve(costs, 0.05, even, max_steps=0, updates=4)
    plan = dict(zip(combinations(range(3), 2), rough.pairs))
    sums = [plan[0, 1].sum(1), plan[0, 1].sum(0), plan[0, 2].sum(0)]
    step = newton.newton_step(plan, sums, even, lambda x: x)
    left, whole = 0.0, 0.0
    for u in range(3):
        image = sums[u] * step.direction[u]
        for v in range(3):
            if v != u:
                image = image + (plan[u, v] if u < v else plan[v, u].T) @ step.direction[v]
        gap = even[u] - sums[u]
        left, whole = left + float(((image - gap) ** 2 / sums[u]).sum()), whole + float((gap**2 / sums[u]).sum())
    assert 0 < left < newton.ENOUGH**2 * whole
    for d, s in zip(step.direction[1:], sums[1:]):
        assert abs(float(d @ s)) < 1e-12

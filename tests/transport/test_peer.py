"""Multi-marginal Sinkhorn against OTT-JAX's, the public one: potentials up to their gauge, and the plan."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain import objectives
from mvpretrain.testing.tables import draw, names
from mvpretrain.transport.sinkhorn import solve
from mvpretrain.types import Embeddings

TIGHT = 1e-6  # OTT computes in float32: its error cannot fall much below


@pytest.fixture(scope="module")
def theirs() -> Any:
    missing = "OTT-JAX is not installed: pip install 'mvpretrain[peers]'"
    peer = pytest.importorskip("ott.experimental.mmsinkhorn", reason=missing)
    return peer.MMSinkhorn(threshold=TIGHT)


def onto(plan: Tensor, *axes: int) -> Tensor:
    rest = [axis for axis in range(plan.ndim) if axis not in axes]
    return plan.sum(rest) if rest else plan


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("sizes", [(9, 12), (9, 7, 8), (6, 5, 7, 4)], ids=str)
def test_finds_the_potentials_and_the_plan_of_ott(theirs, sizes, epsilon):
    points = [normalize(draw(u, n, 5), dim=1) for u, n in enumerate(sizes)]
    marginals = [draw(50 + u, n).softmax(0) for u, n in enumerate(sizes)]
    costs = [torch.cdist(points[u], points[v]).square() for u, v in combinations(range(len(sizes)), 2)]
    found = solve(costs, epsilon, marginals, 1e-12, 200)
    x_s, a_s = (tuple(np.asarray(x, dtype=np.float32) for x in given) for given in (points, marginals))
    peer = theirs(x_s, a_s, epsilon=epsilon)
    shifts = []
    for mine, other in zip(found.potentials, peer.potentials):
        apart = mine - torch.tensor(np.asarray(other), dtype=torch.float64)
        shifts.append(apart.mean())
        torch.testing.assert_close(apart, apart.mean().expand_as(apart), rtol=0, atol=1e-5)
    assert abs(float(torch.stack(shifts).sum())) < 1e-5
    plan = torch.tensor(np.asarray(peer.tensor), dtype=torch.float64)
    for pair, (u, v) in zip(found.pairs, combinations(range(len(sizes)), 2)):
        torch.testing.assert_close(pair, onto(plan, u, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_gradient_of_the_gap_is_that_of_jax(theirs, k):
    jax = pytest.importorskip("jax")
    n, epsilon = 6, 0.1
    z = {v: normalize(draw(i, n, 5), dim=1).requires_grad_() for i, v in enumerate(names(k))}
    present = dict.fromkeys(z, torch.ones(n, dtype=torch.bool))
    whole = Embeddings(z, torch.arange(n), present, torch.full((n,), -1))
    settings = {"kind": "m3g", "epsilon": epsilon, "tolerance": 1e-12, "max_steps": 200}
    loss = objectives.build(settings, names(k))(whole, whole).total
    loss.backward()

    def gap(x_s):
        # OTT's cost is the plain sum of squared distances, the gap's is that / k^2: epsilon_OTT = k^2 epsilon.
        out = theirs(x_s, epsilon=k**2 * epsilon)
        true = sum(((x - y) ** 2).sum(1).mean() for x, y in combinations(x_s, 2))
        return (true - out.ent_reg_cost) / k**2

    given = tuple(jax.numpy.asarray(x.detach().float().numpy()) for x in z.values())
    value, gradients = jax.value_and_grad(gap)(given)
    assert float(loss.detach()) == pytest.approx(float(value) - epsilon * math.log(n), abs=1e-5)
    for x, other in zip(z.values(), gradients):
        assert x.grad is not None
        # <x, y> and ||x - y||^2 differ along x, which the unit sphere does not see.
        mine, other = (along_sphere(g, x.detach()) for g in (x.grad, torch.tensor(np.asarray(other)).double()))
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def along_sphere(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient - (gradient * x).sum(1, keepdim=True) * x

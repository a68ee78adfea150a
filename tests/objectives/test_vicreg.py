"""VICReg against numpy's covariances and loops over pairs."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, relu

from mvpretrain.testing.tables import leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"invariance": 5.0, "variance": 10.0, "covariance": 2.0, "deviation": 0.9}]


def vicreg(k: int, **config: Any) -> nn.Module:
    return build({"kind": "vicreg", **config}, k)


def loop(whole: Embeddings, a: float, b: float, c: float, deviation: float) -> dict[str, float]:
    """The docstring's formula, pair by pair and view by view."""
    d = next(iter(whole.z.values())).shape[1]
    x = {v: z.numpy() * np.sqrt(d) for v, z in whole.z.items()}
    p = {v: x.numpy() for v, x in whole.present.items()}
    distances = []
    for u, v in combinations(x, 2):
        distances += [((x[u][i] - x[v][i]) ** 2).mean() for i in np.flatnonzero(p[u] & p[v])]
    variance, covariance = [], []
    for v in x:
        rows = x[v][p[v]]
        deviations = np.sqrt(rows.var(axis=0, ddof=1) + 1e-4)
        variance.append(np.maximum(0, deviation - deviations).mean())
        c_v = np.cov(rows.T)
        covariance.append(sum(c_v[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d)
    found = {
        "loss/invariance": np.mean(distances),
        "loss/variance": np.mean(variance),
        "loss/covariance": np.mean(covariance),
    }
    total = a * found["loss/invariance"] + 2 * (b * found["loss/variance"] + c * found["loss/covariance"])
    return {name: float(x) for name, x in (found | {"total": total}).items()}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_value_is_that_of_the_loop(k, plain):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(vicreg(k)(whole, whole)) == pytest.approx(loop(whole, 25, 25, 1, 1), rel=1e-10)
    assert floats(vicreg(k, **VARIANTS[0])(whole, whole)) == pytest.approx(loop(whole, 5, 10, 2, 0.9), rel=1e-10)


def test_two_views_are_the_papers_sum():
    whole = table(2, plain=True, dtype=torch.float64)
    x, y = (z * 8**0.5 for z in whole.z.values())
    wanted = 25 * mse_loss(x, y)
    for rows in (x, y):
        covariance = torch.cov(rows.T)
        wanted += 25 * relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        wanted += (covariance - covariance.diagonal().diag()).square().sum() / 8
    torch.testing.assert_close(vicreg(2)(whole, whole).total, wanted, rtol=1e-12, atol=0)


def test_three_views_are_the_mean_of_their_pairs():
    whole = table(3, plain=True, dtype=torch.float64)
    pairs = [whole._replace(z={"view0": whole.z[u], "view1": whole.z[v]}) for u, v in combinations(whole.z, 2)]
    wanted = sum(vicreg(2)(pair, pair).total for pair in pairs) / 3
    torch.testing.assert_close(vicreg(3)(whole, whole).total, wanted, rtol=1e-12, atol=0)


def test_perfect_alignment_and_collapse_are_finite():
    whole = orthonormal(3)
    losses = vicreg(3)(whole, whole)
    assert_finite(losses, whole)
    assert float(losses.parts["loss/invariance"]) == pytest.approx(0, abs=1e-12)
    collapsed = leaves(whole._replace(z={v: z.detach()[:1].expand_as(z) for v, z in whole.z.items()}))
    losses = vicreg(3)(collapsed, collapsed)
    assert_finite(losses, collapsed)
    assert float(losses.parts["loss/variance"]) == pytest.approx(0.99, abs=1e-6)


def test_a_view_with_one_row_has_no_spread():
    whole = table(2, plain=True, dtype=torch.float64).rows(slice(6))
    few = whole._replace(present=whole.present | {"view1": torch.arange(6) == 3})
    parts, one = vicreg(2)(few, few).parts, vicreg(2)(whole._replace(z=dict.fromkeys(whole.z, whole.z["view0"])), whole)
    assert one.total.isfinite()
    x = whole.z["view0"] * 8**0.5
    deviations = (x.var(dim=0) + 1e-4).sqrt()
    assert float(parts["loss/variance"]) == pytest.approx(float(relu(1 - deviations).mean()) / 2)

"""Barlow Twins against loops over correlations and torch's batch normalisation."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from mvpretrain.testing.tables import ROWS, leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"off_diagonal": 0.1}]


def barlow(k: int, **config: Any) -> nn.Module:
    return build({"kind": "barlow", **config}, k)


def correlation(x: list[float], y: list[float]) -> float:
    n = len(x)
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / n
    variances = [math.fsum((a - m) ** 2 for a in z) / n + 1e-5 for z, m in ((x, mean_x), (y, mean_y))]
    return covariance / math.sqrt(variances[0] * variances[1])


def loop(whole: Embeddings, off_diagonal: float) -> dict[str, float]:
    """The docstring's formula, a pair of dimensions at a time."""
    found: dict[str, float] = {}
    for u, v in combinations(whole.z, 2):
        both = whole.present[u] & whole.present[v]
        x, y = ((whole.z[w][both] * 8**0.5).T.tolist() for w in (u, v))
        c = [[correlation(a, b) for b in y] for a in x]
        own = sum((1 - c[i][i]) ** 2 for i in range(8))
        others = sum(c[i][j] ** 2 for i in range(8) for j in range(8) if i != j)
        found[f"loss/{u}-{v}"] = own + off_diagonal * others
        found[f"correlation/{u}-{v}"] = sum(c[i][i] for i in range(8)) / 8
    losses = [x for name, x in found.items() if name.startswith("loss/")]
    return found | {"total": sum(losses) / len(losses)}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_value_is_that_of_the_loop(k, plain):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(barlow(k)(whole, whole)) == pytest.approx(loop(whole, 0.0051), rel=1e-10)
    assert floats(barlow(k, **VARIANTS[0])(whole, whole)) == pytest.approx(loop(whole, 0.1), rel=1e-10)


def test_two_views_are_batch_normalised():
    whole = table(2, plain=True, dtype=torch.float64)
    x, y = (batch_norm(z * 8**0.5, None, None, training=True) for z in whole.z.values())
    c = x.T @ y / ROWS
    own = torch.eye(8, dtype=torch.bool)
    wanted = (1 - c[own]).square().sum() + 0.0051 * c[~own].square().sum()
    torch.testing.assert_close(barlow(2)(whole, whole).total, wanted, rtol=1e-10, atol=0)


def test_perfect_alignment_and_collapse_are_finite():
    whole = orthonormal(3)
    losses = barlow(3)(whole, whole)
    assert_finite(losses, whole)
    assert float(losses.parts["correlation/view0-view1"]) == pytest.approx(1, abs=1e-4)
    collapsed = leaves(whole._replace(z={v: z.detach()[:1].expand_as(z) for v, z in whole.z.items()}))
    assert_finite(barlow(3)(collapsed, collapsed), collapsed)


def test_a_pair_of_one_row_is_zero():
    whole = table(3, plain=True, dtype=torch.float64)
    few = whole._replace(present=whole.present | {"view2": torch.arange(ROWS) == 3})
    parts = barlow(3)(few, few).parts
    assert parts["loss/view0-view2"] == parts["loss/view1-view2"] == 0 < parts["loss/view0-view1"]

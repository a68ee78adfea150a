"""Alignment and uniformity against loops over their formula and torch.pdist."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from mvpretrain.testing.tables import leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"alpha": 1.0, "t": 3.0, "alignment": 0.5, "uniformity": 2.0}]
CASES = [{"alpha": 2.0, "t": 2.0, "alignment": 1.0, "uniformity": 1.0}, *VARIANTS]
case_of = pytest.mark.parametrize("config", CASES, ids=str)


def objective(k: int, **config: Any) -> nn.Module:
    return build({"kind": "alignment_uniformity", **config}, k)


def loop(whole: Embeddings, alpha: float, t: float, alignment: float, uniformity: float) -> dict[str, float]:
    """The docstring's formula, a distance at a time."""
    z, ids = {v: rows.tolist() for v, rows in whole.z.items()}, whole.ids.tolist()
    close, spread = [], []
    for u, v in combinations(z, 2):
        both = (whole.present[u] & whole.present[v]).nonzero().squeeze(1).tolist()
        close.append(sum(math.dist(z[u][i], z[v][i]) ** alpha for i in both) / len(both))
    for v in z:
        rows = whole.present[v].nonzero().squeeze(1).tolist()
        terms = [math.exp(-t * math.dist(z[v][i], z[v][j]) ** 2) for i in rows for j in rows if ids[i] != ids[j]]
        spread.append(math.log(sum(terms) / len(terms)))
    found = {"loss/alignment": sum(close) / len(close), "loss/uniformity": sum(spread) / len(spread)}
    return found | {"total": alignment * found["loss/alignment"] + uniformity * found["loss/uniformity"]}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 5])
@case_of
def test_value_is_that_of_the_loop(config, k, plain):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(objective(k, **config)(whole, whole)) == pytest.approx(loop(whole, **config), rel=1e-10)


def test_two_views_are_the_papers_code():
    whole = table(2, plain=True, dtype=torch.float64)
    x, y = whole.z.values()
    wanted = (x - y).norm(dim=1).square().mean()
    wanted += sum(torch.pdist(rows).square().mul(-2).exp().mean().log() for rows in (x, y)) / 2
    torch.testing.assert_close(objective(2)(whole, whole).total, wanted, rtol=1e-10, atol=0)


@case_of
def test_perfect_alignment_and_collapse_are_finite(config):
    whole = orthonormal(3)
    losses = objective(3, **config)(whole, whole)
    assert_finite(losses, whole)
    assert float(losses.parts["loss/uniformity"]) == pytest.approx(-2 * config["t"])
    collapsed = leaves(whole._replace(z={v: z.detach()[:1].expand_as(z) for v, z in whole.z.items()}))
    losses = objective(3, **config)(collapsed, collapsed)
    assert_finite(losses, collapsed)
    assert float(losses.parts["loss/uniformity"]) == pytest.approx(0, abs=1e-12)


def test_a_view_without_a_pair_is_zero():
    whole = table(2, plain=True, dtype=torch.float64)
    few = whole._replace(present=whole.present | {"view1": torch.arange(12) == 3})
    parts = objective(2)(few, few).parts
    assert float(parts["loss/uniformity"]) == pytest.approx(
        float(torch.pdist(whole.z["view0"]).square().mul(-2).exp().mean().log()) / 2
    )

"""DCL and DCLW against loops over their formulas and a dense one."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain.testing.tables import ROWS, leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"weighted": 0.5, "temperature": 0.2}]
CONFIGS: list[dict[str, Any]] = [{"kind": "dcl"}, *({"kind": "dcl", **more} for more in VARIANTS)]
config_of = pytest.mark.parametrize("config", CONFIGS, ids=["dcl", "dclw"])


def loop_one_direction(whole: Embeddings, u: str, v: str, tau: float, sigma: float | None) -> float:
    """The docstring's formula, an anchor at a time."""
    ids, n = whole.ids.tolist(), range(len(whole.ids))
    positive, negative = [], []
    for i in (i for i in n if whole.present[u][i]):
        z = whole.z[u][i]
        same = [float(z @ whole.z[v][j]) for j in n if whole.present[v][j] and ids[j] == ids[i]]
        others = [float(z @ whole.z[w][j]) for w in (u, v) for j in n if whole.present[w][j] and ids[j] != ids[i]]
        if same and others:
            positive.append(sum(same) / len(same))
            negative.append(math.log(math.fsum(math.exp(s / tau) for s in others)))
    weights = [1.0] * len(positive)
    if sigma is not None and positive:
        average = sum(math.exp(s / sigma) for s in positive) / len(positive)
        weights = [2 - math.exp(s / sigma) / average for s in positive]
        assert sum(weights) == pytest.approx(len(weights))
    losses = [-w * s / tau + e for w, s, e in zip(weights, positive, negative)]
    return sum(losses) / max(len(losses), 1)


def loop(whole: Embeddings, config: dict[str, Any]) -> dict[str, float]:
    tau, sigma = config.get("temperature", 0.1), config.get("weighted")
    pairs = list(combinations(whole.z, 2))
    found = {
        f"loss/{u}-{v}": (loop_one_direction(whole, u, v, tau, sigma) + loop_one_direction(whole, v, u, tau, sigma)) / 2
        for u, v in pairs
    }
    return {"total": sum(found.values()) / len(pairs), **found}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@config_of
def test_value_is_that_of_the_loop(config, k, plain):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(build(config, k)(whole, whole)) == pytest.approx(loop(whole, config), rel=1e-10, abs=1e-12)


def dense_weighted(z: dict[str, Tensor], tau: float, sigma: float) -> Tensor:
    """DCLW of two plain views; the weights are constants."""
    a, b = z.values()
    values, own = [], torch.eye(len(a), dtype=torch.bool)
    for x, y in ((a, b), (b, a)):
        positive = (x * y).sum(dim=1)
        w = (2 - len(a) * (positive / sigma).softmax(dim=0)).detach()
        scores = torch.cat([(x @ x.T).masked_fill(own, -torch.inf), (x @ y.T).masked_fill(own, -torch.inf)], dim=1)
        values.append(((scores / tau).logsumexp(dim=1) - w * positive / tau).mean())
    return torch.stack(values).mean()


def test_the_weights_of_dclw_are_constants_to_the_gradient():
    whole = leaves(table(2, plain=True, dtype=torch.float64))
    losses = build(CONFIGS[1], 2)(whole, whole).total, dense_weighted(whole.z, 0.2, 0.5)
    gradients = [torch.autograd.grad(x, list(whole.z.values())) for x in losses]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k", [2, 5])
@config_of
def test_perfect_alignment_is_finite(config, k):
    whole = orthonormal(k)
    losses = build(config, k)(whole, whole)
    assert_finite(losses, whole)
    tau = config.get("temperature", 0.1)
    assert floats(losses)["total"] == pytest.approx(math.log(2 * (ROWS - 1)) - 1 / tau)  # every weight is 1


@config_of
def test_without_another_sample_there_is_no_loss(config):
    whole = leaves(table(2, plain=True, dtype=torch.float64).rows(slice(0, 2)))
    whole = whole._replace(ids=torch.tensor([4, 4]))
    losses = build(config, 2)(whole, whole)
    assert_finite(losses, whole)
    assert floats(losses)["total"] == 0


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"weighted": -0.5}])
def test_wrong_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        build({"kind": "dcl", **bad}, 2)

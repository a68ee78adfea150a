"""The sigmoid loss against loops over its formula and open_clip."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from mvpretrain.testing.tables import leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"per_pair": True, "scale": 4.0, "bias": -2.0}]
CONFIGS = [{"kind": "sigmoid"}, *({"kind": "sigmoid", **more} for more in VARIANTS)]
config_of = pytest.mark.parametrize("config", CONFIGS, ids=["shared", "per pair"])


def loop(whole: Embeddings, scales: list[float], biases: list[float]) -> dict[str, float]:
    """The docstring's formula, two rows at a time."""
    found, n = {}, range(len(whole.ids))
    for index, (u, v) in enumerate(combinations(whole.z, 2)):
        t, c = scales[index % len(scales)], biases[index % len(biases)]
        total = 0.0
        for i in (i for i in n if whole.present[u][i]):
            for j in (j for j in n if whole.present[v][j]):
                sign = 1 if whole.ids[i] == whole.ids[j] else -1
                total += math.log1p(math.exp(-sign * (t * float(whole.z[u][i] @ whole.z[v][j]) + c)))
        rows = (int(whole.present[u].sum()) + int(whole.present[v].sum())) / 2
        found[f"loss/{u}-{v}"] = total / rows
    return {"total": sum(found.values()) / len(found), **found}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@config_of
def test_value_is_that_of_the_loop(config, k, plain):
    objective, whole = build(config, k), table(k, seed=3, dtype=torch.float64, plain=plain)
    scales, biases = objective.log_scale.exp().tolist(), objective.bias.tolist()  # type: ignore[operator, union-attr]
    found = floats(objective(whole, whole))
    losses = {name: x for name, x in found.items() if not name.startswith(("scale", "bias"))}
    assert losses == pytest.approx(loop(whole, scales, biases), rel=1e-10)
    pairs = [f"/{u}-{v}" for u, v in combinations(whole.z, 2)] if config.get("per_pair") else [""]
    wanted = {f"scale{p}": t for p, t in zip(pairs, scales)} | {f"bias{p}": c for p, c in zip(pairs, biases)}
    assert found == pytest.approx(losses | wanted)


def test_two_views_are_open_clips_loss():
    from open_clip.loss import SigLipLoss

    whole, objective = leaves(table(2, plain=True, dtype=torch.float64)), build({"kind": "sigmoid"}, 2)
    a, b = whole.z.values()
    scale, bias = objective.log_scale.exp().detach(), objective.bias.detach()  # type: ignore[operator, union-attr]
    wanted = SigLipLoss()(a, b, scale, bias)
    found = objective(whole, whole).total
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, [a, b]) for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_starts_as_the_paper_says_and_may_be_fixed():
    whole = table(2, dtype=torch.float64)
    found = floats(build({"kind": "sigmoid"}, 2)(whole, whole))
    assert found["scale"] == pytest.approx(10) and found["bias"] == -10
    fixed = build({"kind": "sigmoid", "learnable": False}, 2)
    assert not any(p.requires_grad for p in fixed.parameters())
    assert [p.shape for p in build(CONFIGS[1], 4).parameters()] == [(6,), (6,)]


@pytest.mark.parametrize("k", [2, 5])
def test_perfect_alignment_is_finite_and_falls_with_the_scale(k):
    whole = orthonormal(k)
    assert_finite(build({"kind": "sigmoid"}, k)(whole, whole), whole)
    sharp = build({"kind": "sigmoid", "scale": 200.0, "bias": -100.0}, k)(whole, whole)
    assert float(sharp.total.detach()) == pytest.approx(0, abs=1e-12)


def test_a_positive_in_another_row_is_found():
    # Sample 5 has view0 in one row and view1 in another, as when its views lie in different shards.
    whole = table(2, plain=True, dtype=torch.float64).rows(slice(0, 4))
    present = {"view0": torch.tensor([True, True, False, True]), "view1": torch.tensor([True, False, True, False])}
    whole = whole._replace(ids=torch.tensor([9, 5, 5, 2]), present=present)
    found = floats(build({"kind": "sigmoid"}, 2)(whole, whole))["total"]
    assert found == pytest.approx(loop(whole, [10.0], [-10.0])["total"], rel=1e-6)


@pytest.mark.parametrize("bad", [{"scale": 0}, {"scale": float("inf")}, {"bias": float("nan")}])
def test_wrong_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        build({"kind": "sigmoid", **bad}, 2)

"""GRAM against numpy's determinants in loops and torch's cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from mvpretrain.objectives.gram import adjugate_and_determinant
from mvpretrain.testing.tables import ROWS, draw, leaves, names, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import assert_finite, assert_tiles_change_nothing, build, floats, orthonormal

CASES: dict[str, dict[str, Any]] = {
    "default": {"temperature": {"init": 0.2}},
    "anchor": {"anchor": "view1", "temperature": {"init": 0.3}},
    "all, smoothed": {"anchor": "all", "label_smoothing": 0.2, "temperature": {"init": 0.2}},
}
case_of = pytest.mark.parametrize("case", CASES)


def gram(k: int, **config: Any) -> nn.Module:
    return build({"kind": "gram", **config}, k)


def volume(rows: list[np.ndarray]) -> float:
    z = np.stack(rows)
    return math.sqrt(max(np.linalg.det(z @ z.T), 0) + 1e-6)


def softmax_loss(scores: dict[int, float], own: int, smoothing: float) -> float:
    log_sum = math.log(math.fsum(map(math.exp, scores.values())))
    mean = sum(scores.values()) / len(scores)
    return log_sum - (1 - smoothing) * scores[own] - smoothing * mean


def loop(whole: Embeddings, config: dict[str, Any]) -> dict[str, float]:
    """The docstring's formula, a pair of rows at a time."""
    tau, smoothing = config["temperature"]["init"], config.get("label_smoothing", 0.0)
    views, ids = list(whole.z), whole.ids.tolist()
    rows = [i for i in range(len(ids)) if all(whole.present[v][i] for v in views)]
    z = {v: whole.z[v].numpy() for v in views}
    anchor = config.get("anchor", views[0])
    found: dict[str, float] = {}
    for a in views if anchor == "all" else [anchor]:
        losses, hits = [], []
        for i in rows:
            others = [j for j in rows if ids[j] != ids[i]]
            first = {j: -volume([z[a][i], *(z[v][j] for v in views if v != a)]) / tau for j in [i, *others]}
            second = {j: -volume([z[a][j], *(z[v][i] for v in views if v != a)]) / tau for j in [i, *others]}
            losses.append((softmax_loss(first, i, smoothing) + softmax_loss(second, i, smoothing)) / 2)
            hits.append(((max(first, key=lambda j: first[j]) == i) + (max(second, key=lambda j: second[j]) == i)) / 2)
        found[f"loss/{a}"] = sum(losses) / len(rows)
        found[f"accuracy/{a}"] = sum(hits) / len(rows)
    found["volume"] = sum(volume([z[v][i] for v in views]) for i in rows) / len(rows)
    losses = [x for name, x in found.items() if name.startswith("loss/")]
    return found | {"total": sum(losses) / len(losses), "temperature": tau}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@case_of
def test_value_is_that_of_the_loop(case, k, plain):
    objective, whole = gram(k, **CASES[case]), table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(objective(whole, whole)) == pytest.approx(loop(whole, CASES[case]), rel=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_views_contrast_the_sine_of_their_angle(smoothing):
    whole = table(2, plain=True, dtype=torch.float64)
    scores = -(1 - (whole.z["view0"] @ whole.z["view1"].T).square() + 1e-6).sqrt() / 0.25
    target = torch.arange(ROWS)
    wanted = [cross_entropy(s, target, label_smoothing=smoothing) for s in (scores, scores.T)]
    found = gram(2, temperature={"init": 0.25}, label_smoothing=smoothing)(whole, whole).total
    torch.testing.assert_close(found, sum(wanted) / 2, rtol=1e-7, atol=0)


def test_signs_do_not_matter():
    objective, whole = gram(3), table(3, dtype=torch.float64)
    flipped = whole._replace(z=whole.z | {"view1": -whole.z["view1"]})
    torch.testing.assert_close(objective(flipped, flipped).total, objective(whole, whole).total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_adjugate_and_determinant(m):
    z = draw(m, 40, m, 6)
    a = z @ z.mT
    adjugate, determinant = adjugate_and_determinant(a)
    torch.testing.assert_close(determinant, torch.linalg.det(a), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a @ adjugate, determinant[:, None, None] * torch.eye(m).double(), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(adjugate, determinant[:, None, None] * a.inverse(), rtol=1e-7, atol=1e-7)


def test_adjugate_of_singular_matrices():
    # Rank one below full: adj A = (product of the other eigenvalues) w w^T; lower: 0.
    z = draw(1, 3, 6)
    z[2] = z[1]
    adjugate, determinant = adjugate_and_determinant((z @ z.T)[None])
    values, w = torch.linalg.eigh(z @ z.T)
    torch.testing.assert_close(adjugate[0], values[1] * values[2] * w[:, :1] @ w[:, :1].T, rtol=1e-9, atol=1e-9)
    assert determinant.abs() < 1e-9
    adjugate, _ = adjugate_and_determinant(torch.ones(1, 3, 3, dtype=torch.float64))
    assert adjugate.abs().max() == 0


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_float32_volumes_are_near_those_of_float64(k):
    # Views at small angles: the determinant is a small difference of large numbers.
    for angle in (1.0, 0.1, 0.0):
        rows = normalize(draw(1, ROWS, 1, 16) + angle * draw(2, ROWS, k, 16), dim=2)
        wide = table(k, plain=True, dtype=torch.float64)._replace(z=dict(zip(names(k), rows.unbind(1))))
        narrow = wide._replace(z={v: z.float() for v, z in wide.z.items()})
        wanted = sum(volume([z[i].numpy() for z in wide.z.values()]) for i in range(ROWS)) / ROWS
        assert float(gram(k).float()(narrow, narrow).parts["volume"]) == pytest.approx(wanted, rel=1e-3, abs=5e-4)


@case_of
def test_tiles_change_nothing(monkeypatch, case):
    assert_tiles_change_nothing(monkeypatch, gram(3, **CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_perfect_alignment_is_finite(k, dtype):
    whole = orthonormal(k)
    whole = leaves(whole._replace(z={v: z.to(dtype) for v, z in whole.z.items()}))
    objective = gram(k, anchor="all", label_smoothing=0.1).to(dtype)
    assert_finite(objective(whole, whole), whole)
    # Moving along the sphere changes nothing where the volume is at its least.
    for z in whole.z.values():
        assert z.grad is not None
        along = z.grad - (z.grad * z.detach()).sum(dim=1, keepdim=True) * z.detach()
        assert along.norm() < 1e-2


@pytest.mark.parametrize(("config", "message"), [
    ({"anchor": "vieww1"}, "unknown view in objective.anchor 'vieww1'; did you mean 'view1'?"),
    ({"temperature": {"per_pair": True}}, "per_pair is true, but gram compares whole tuples"),
    ({"label_smoothing": 1.0}, "less than 1"),
])  # fmt: skip
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        gram(3, **config)

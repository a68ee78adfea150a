"""TRIANGLE against Heron's formula in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvpretrain import objectives
from mvpretrain.testing.tables import leaves, names, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    assert_tiles_change_nothing,
    build,
    floats,
    orthonormal,
)

CASES: dict[str, dict[str, Any]] = {
    "default": {"temperature": {"init": 0.2}},
    "anchor, alpha": {"anchor": "view2", "alpha": 0.7, "temperature": {"init": 0.2}},
    "all, smoothed": {"anchor": "all", "alpha": 0.3, "label_smoothing": 0.2, "temperature": {"init": 0.1}},
}
case_of = pytest.mark.parametrize("case", CASES)


def triangle(**config: Any) -> nn.Module:
    return build({"kind": "triangle", **config}, 3)


def area(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """By the lengths of the sides, and then the 1e-6 under the root."""
    x, y, z = (math.dist(p, q) for p, q in ((a, b), (b, c), (c, a)))
    s = (x + y + z) / 2
    return math.sqrt(4 * s * (s - x) * (s - y) * (s - z) + 1e-6) / 2


def loop(whole: Embeddings, config: dict[str, Any]) -> dict[str, float]:
    """The docstring's formula, a pair of rows at a time."""
    tau, smoothing, alpha = config["temperature"]["init"], config.get("label_smoothing", 0), config.get("alpha", 0)
    views, ids = list(whole.z), whole.ids.tolist()
    rows = [i for i in range(len(ids)) if all(whole.present[v][i] for v in views)]
    z = {v: whole.z[v].numpy() for v in views}
    anchor = config.get("anchor", views[0])
    found: dict[str, float] = {}

    def score(a: str, i: int, j: int) -> float:
        x, (y, w) = z[a][i], (z[v][j] for v in views if v != a)
        return (alpha * (x @ y + x @ w) / 2 - area(x, y, w)) / tau

    for a in views if anchor == "all" else [anchor]:
        losses, hits = [], []
        for i in rows:
            for turned in (False, True):
                scores = {j: score(a, j, i) if turned else score(a, i, j) for j in rows if j == i or ids[j] != ids[i]}
                log_sum = math.log(math.fsum(map(math.exp, scores.values())))
                mean = sum(scores.values()) / len(scores)
                losses.append(log_sum - (1 - smoothing) * scores[i] - smoothing * mean)
                hits.append(max(scores, key=lambda j: scores[j]) == i)
        found[f"loss/{a}"], found[f"accuracy/{a}"] = sum(losses) / len(losses), sum(hits) / len(hits)
    found["area"] = sum(area(*(z[v][i] for v in views)) for i in rows) / len(rows)
    losses = [x for name, x in found.items() if name.startswith("loss/")]
    return found | {"total": sum(losses) / len(losses), "temperature": tau}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@case_of
def test_value_is_that_of_the_loop(case, plain):
    objective, whole = triangle(**CASES[case]), table(3, seed=3, dtype=torch.float64, plain=plain)
    assert floats(objective(whole, whole)) == pytest.approx(loop(whole, CASES[case]), rel=1e-7)


@case_of
def test_tiles_change_nothing(monkeypatch, case):
    assert_tiles_change_nothing(monkeypatch, triangle(**CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_alignment_is_finite(dtype):
    whole = orthonormal(3)
    whole = leaves(whole._replace(z={v: z.to(dtype) for v, z in whole.z.items()}))
    losses = triangle(anchor="all", label_smoothing=0.1).to(dtype)(whole, whole)
    assert_finite(losses, whole)
    assert float(losses.parts["area"]) == pytest.approx(5e-4, rel=1e-3)


@pytest.mark.parametrize(("views", "config", "message"), [
    (4, {}, "'triangle' takes 3 views, got 4: view0, view1, view2, view3; kind 'gram' takes any number"),
    (2, {}, "takes 3 views, got 2"),
    (3, {"anchor": "text"}, "unknown view in objective.anchor 'text'"),
    (3, {"temperature": {"per_pair": True}}, "per_pair is true, but triangle compares whole triples"),
])  # fmt: skip
def test_wrong_settings_are_refused(views, config, message):
    with pytest.raises(ValueError, match=message):
        objectives.build({"kind": "triangle", **config}, names(views))

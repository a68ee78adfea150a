"""One view against the average of the rest: loops over its formula, and infonce at k = 2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain.testing.tables import leaves, names, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    build,
    floats,
)

VARIANTS = [{"normalize": False}, {"temperature": {"init": 0.2, "per_pair": True}}]
CONFIGS: list[dict[str, Any]] = [{"kind": "one_vs_rest"}, *({"kind": "one_vs_rest", **more} for more in VARIANTS)]
config_of = pytest.mark.parametrize("config", CONFIGS, ids=["default", "not normalised", "per view"])

Rows = dict[int, Tensor]  # row number -> vector, for rows that have it


def loop_one_direction(ids: list[int], anchors: Rows, candidates: Rows, tau: float) -> tuple[float, float]:
    losses, hits = [], []
    for i, anchor in anchors.items():
        score = {j: float(anchor @ z) / tau for j, z in candidates.items()}
        positives = [score[j] for j in score if ids[j] == ids[i]]
        if positives:
            losses.append(math.log(math.fsum(map(math.exp, score.values()))) - sum(positives) / len(positives))
            hits.append(ids[max(score, key=lambda j: score[j])] == ids[i])
    return sum(losses) / max(len(losses), 1), sum(hits) / max(len(hits), 1)


def loop(whole: Embeddings, config: dict[str, Any], taus: list[float]) -> dict[str, float]:
    """The docstring's formula, a row at a time."""
    found, ids = {}, whole.ids.tolist()
    for index, u in enumerate(whole.z):
        tau, own, rest = taus[index % len(taus)], {}, {}
        for i in range(len(ids)):
            if whole.present[u][i]:
                own[i] = whole.z[u][i]
            others = [whole.z[v][i] for v in whole.z if v != u and whole.present[v][i]]
            if others:
                mean = sum(others[1:], others[0]) / len(others)
                rest[i] = mean / mean.norm() if config.get("normalize", True) else mean
        first, second = loop_one_direction(ids, own, rest, tau), loop_one_direction(ids, rest, own, tau)
        found[f"loss/{u}"], found[f"accuracy/{u}"] = (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
    return {"total": sum(found[f"loss/{u}"] for u in whole.z) / len(whole.z), **found}


def without_temperature(found: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in found.items() if not name.startswith("temperature")}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@config_of
def test_value_is_that_of_the_loop(config, k, plain):
    objective, whole = build(config, k), table(k, seed=3, dtype=torch.float64, plain=plain)
    found = floats(objective(whole, whole))
    taus = objective.log_temperature.exp().tolist()  # type: ignore[operator, union-attr]
    assert without_temperature(found) == pytest.approx(loop(whole, config, taus), rel=1e-10, abs=1e-12)
    assert [x for name, x in found.items() if name.startswith("temperature")] == pytest.approx(taus)


def test_two_views_are_infonce():
    whole = table(2, seed=5, dtype=torch.float64)
    found, wanted = build({"kind": "one_vs_rest"}, 2)(whole, whole), build({"kind": "infonce"}, 2)(whole, whole)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-12, atol=0)


def test_views_that_cancel_have_no_direction_and_a_bounded_gradient():
    whole = table(3, plain=True, dtype=torch.float64)
    whole = leaves(whole._replace(z=whole.z | {"view1": -whole.z["view0"]}))
    build({"kind": "one_vs_rest"}, 3)(whole, whole).total.backward()
    for v in names(3):
        grad = whole.z[v].grad
        assert grad is not None and grad.abs().max() < 1e5, v

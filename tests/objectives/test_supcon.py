"""SupCon against loops over its formula, and NT-Xent without labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mvpretrain.similarity.groups import classes
from mvpretrain.testing.tables import ROWS, leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
)

CONFIG: dict[str, Any] = {"kind": "supcon", "temperature": {"init": 0.2}}
# Two samples without a label, one class of a single sample; the rows that share an id share a label (2, 7, 11).
LABELS = torch.tensor([3, 0, 7, 0, 3, -1, 3, 7, -1, 5, 0, 7])


def loop(whole: Embeddings, tau: float) -> dict[str, float]:
    """The docstring's formula, a point at a time."""
    points = [(v, i) for v in whole.z for i in range(len(whole.ids)) if whole.present[v][i]]
    ids, labels, losses = whole.ids.tolist(), whole.labels.tolist(), {v: [] for v in whole.z}
    for u, i in points:
        # Another row of the same id in the same view is this very point.
        others = [(v, j) for v, j in points if not (v == u and ids[j] == ids[i])]
        score = {(v, j): float(whole.z[u][i] @ whole.z[v][j]) / tau for v, j in others}
        same = [s for (v, j), s in score.items() if ids[j] == ids[i] or labels[j] == labels[i] >= 0]
        if same:
            losses[u].append(math.log(math.fsum(map(math.exp, score.values()))) - sum(same) / len(same))
    everything = [x for found in losses.values() for x in found]
    parts = {f"loss/{u}": sum(found) / max(len(found), 1) for u, found in losses.items()}
    return {"total": sum(everything) / max(len(everything), 1), "temperature": tau, **parts}


@pytest.mark.parametrize("labels", [LABELS, torch.full((ROWS,), -1)], ids=["labels", "none"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_value_is_that_of_the_loop(k, plain, labels):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)._replace(labels=labels)
    found = floats(build(CONFIG, k)(whole, whole))
    assert found["temperature"] == pytest.approx(0.2)
    assert found == pytest.approx(loop(whole, found["temperature"]), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_without_labels_it_is_nt_xent_over_all_views(k):
    whole = table(k, plain=True, dtype=torch.float64)
    z = torch.cat(list(whole.z.values()))
    scores = (z @ z.T / 0.2).masked_fill(torch.eye(k * ROWS, dtype=torch.bool), -torch.inf)
    shifts = [cross_entropy(scores, torch.arange(k * ROWS).roll(ROWS * s)) for s in range(1, k)]
    wanted = float(torch.stack(shifts).mean())
    assert floats(build(CONFIG, k)(whole, whole))["total"] == pytest.approx(wanted, rel=1e-7)


def test_one_id_is_one_class_also_where_a_row_lacks_the_label():
    whole = table(2)._replace(ids=torch.tensor([5, 9, 5, 1, 2, 3] * 2), labels=torch.tensor([-1, -1, 4, 4, 6, -1] * 2))
    gathered = classes(whole.ids, whole.labels)
    assert torch.equal(gathered[6:], gathered[:6])
    assert gathered[0] == gathered[2] == gathered[3] == 4 and gathered[4] == 6
    assert len({4, 6, int(gathered[1]), int(gathered[5])}) == 4


def test_anchors_without_positives_are_left_out():
    whole = table(2, plain=True, dtype=torch.float64).rows(slice(0, 3))
    whole = whole._replace(present=whole.present | {"view1": torch.tensor([True, False, False])})
    found = floats(build(CONFIG, 2)(whole, whole))
    assert found == pytest.approx(loop(whole, 0.2), rel=1e-6) and found["total"] > 0
    nothing = whole._replace(present=whole.present | {"view1": torch.zeros(3, dtype=torch.bool)})
    assert floats(build(CONFIG, 2)(nothing, nothing))["total"] == 0
    alone = leaves(nothing.rows(slice(0, 1)))
    assert_finite(build(CONFIG, 2)(alone, alone), alone)


def test_a_temperature_per_pair_is_refused():
    with pytest.raises(ValueError, match="per_pair is true, but supcon has one denominator"):
        build({"kind": "supcon", "temperature": {"per_pair": True}}, 3)

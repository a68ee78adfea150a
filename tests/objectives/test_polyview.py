"""Poly-view losses against loops over their formulas, and NT-Xent at k = 2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mvpretrain.testing.tables import ROWS, leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

FORMS = ["geometric", "arithmetic", "sufficient"]
form_of = pytest.mark.parametrize("form", FORMS)


def config(form: str) -> dict[str, object]:
    return {"kind": "polyview", "form": form, "temperature": {"init": 0.2}}


def mean(rows: list[Tensor]) -> Tensor:
    return sum(rows[1:], rows[0]) / len(rows)


def candidates(whole: Embeddings, form: str) -> dict[str, dict[int, Tensor]]:
    """view -> row -> what stands for it: the view itself, or the mean of the row's other views."""
    found: dict[str, dict[int, Tensor]] = {v: {} for v in whole.z}
    for c in whole.z:
        for j in range(len(whole.ids)):
            others = [whole.z[b][j] for b in whole.z if b != c and whole.present[b][j]]
            if form != "sufficient" and whole.present[c][j]:
                found[c][j] = whole.z[c][j]
            elif form == "sufficient" and others:
                found[c][j] = mean(others)
    return found


def loop(whole: Embeddings, form: str, tau: float) -> dict[str, float]:
    """The docstring's formulas, an anchor at a time."""
    ids, views, losses = whole.ids.tolist(), list(whole.z), {v: [] for v in whole.z}
    points = candidates(whole, form)
    for a in views:
        for i in (i for i in range(len(ids)) if whole.present[a][i]):
            anchor = whole.z[a][i]
            negatives = [z for c in views for j, z in points[c].items() if ids[j] != ids[i]]
            others = math.fsum(math.exp(float(anchor @ z) / tau) for z in negatives)
            p = []
            for b in [a] if form == "sufficient" else [b for b in views if b != a]:
                same = [z for j, z in points[b].items() if ids[j] == ids[i]]
                if same:
                    one = math.exp(float(anchor @ mean(same)) / tau)
                    p.append(one / (one + others))
            if p and form == "arithmetic":
                losses[a].append(-math.log(sum(p) / len(p)))
            elif p:
                losses[a].append(-sum(map(math.log, p)) / len(p))
    everything = [x for found in losses.values() for x in found]
    parts = {f"loss/{a}": sum(found) / max(len(found), 1) for a, found in losses.items()}
    return {"total": sum(everything) / max(len(everything), 1), "temperature": tau, **parts}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@form_of
def test_value_is_that_of_the_loop(form, k, plain):
    objective, whole = build(config(form), k), table(k, seed=3, dtype=torch.float64, plain=plain)
    found = floats(objective(whole, whole))
    assert found["temperature"] == pytest.approx(0.2)
    assert found == pytest.approx(loop(whole, form, found["temperature"]), rel=1e-10, abs=1e-12)


@form_of
def test_two_views_are_simclrs_loss(form):
    # With two views the mean of the others is the other one: the three forms are one.
    whole = table(2, plain=True, dtype=torch.float64)
    z = torch.cat(list(whole.z.values()))
    scores = (z @ z.T / 0.2).masked_fill(torch.eye(2 * ROWS, dtype=torch.bool), -torch.inf)
    wanted = cross_entropy(scores, torch.arange(2 * ROWS).roll(ROWS))
    assert floats(build(config(form), 2)(whole, whole))["total"] == pytest.approx(float(wanted), rel=1e-7)


def test_arithmetic_is_at_most_geometric():
    whole = table(4, dtype=torch.float64)
    found = {form: floats(build(config(form), 4)(whole, whole))["total"] for form in FORMS}
    assert found["arithmetic"] < found["geometric"]


@pytest.mark.parametrize("k", [2, 5])
@form_of
def test_anchors_without_positives_leave_no_nan_behind(form, k):
    whole = leaves(table(k, dtype=torch.float64))  # row 4 has neither the first view nor the last
    assert_finite(build(config(form), k)(whole, whole), whole)


@pytest.mark.parametrize("k", [2, 5])
@form_of
def test_perfect_alignment_and_a_single_sample_are_finite(form, k):
    whole = orthonormal(k)
    assert_finite(build(config(form), k)(whole, whole), whole)
    alone = whole._replace(ids=torch.zeros_like(whole.ids))
    losses = build(config(form), k)(alone, alone)
    assert_finite(losses, alone)
    assert floats(losses)["total"] == pytest.approx(0, abs=1e-12)  # the positive is all there is in its denominator


def test_a_temperature_per_pair_is_refused():
    with pytest.raises(ValueError, match="per_pair is true, but polyview has one denominator"):
        build({"kind": "polyview", "temperature": {"per_pair": True}}, 3)

"""InfoNCE against loops over its formula, open_clip and a plain NT-Xent."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mvpretrain import objectives
from mvpretrain.objectives.infonce import InfoNCE
from mvpretrain.testing.tables import ROWS, leaves, names, table
from mvpretrain.types import Embeddings, Losses

PAIRS = [("view2", "view0"), ("view1", "view2"), ("view3", "view1")]
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "in_view": {"in_view": True},
    "anchor": {"pairs": "view1"},
    "weights": {"weights": {"view0-view1": 2.5}, "temperature": {"init": 0.3}},
    "per pair": {"temperature": {"init": 0.2, "per_pair": True}},
    "all at once": {"in_view": True, "temperature": {"per_pair": True}, "weights": {"view0-view1": 0.5}},
    "scalars": {"gradient": "scalars", "in_view": True, "temperature": {"init": 0.2, "per_pair": True}},
}
case_of = pytest.mark.parametrize("case", CASES)


def infonce(config: dict[str, Any], k: int) -> InfoNCE:
    """In float64; temperatures that differ where there are several."""
    objective = objectives.build({"kind": "infonce", **config}, names(k))
    assert isinstance(objective, InfoNCE)
    with torch.no_grad():
        objective.log_temperature.add_(torch.arange(len(objective.log_temperature)) / 7)
    return objective.double()


def loop_one_direction(whole: Embeddings, u: str, v: str, tau: float, in_view: bool) -> tuple[float, float]:
    """The docstring's formula, a row at a time: (mean loss of the anchors, share of them with a positive on top)."""
    n, ids = len(whole.ids), whole.ids.tolist()
    losses, hits = [], []
    for i in (i for i in range(n) if whole.present[u][i]):
        score = {j: float(whole.z[u][i] @ whole.z[v][j]) / tau for j in range(n) if whole.present[v][j]}
        positives = [score[j] for j in score if ids[j] == ids[i]]
        if not positives:
            continue
        terms = list(score.values())
        if in_view:
            others = [j for j in range(n) if whole.present[u][j] and ids[j] != ids[i]]
            terms += [float(whole.z[u][i] @ whole.z[u][j]) / tau for j in others]
        losses.append(math.log(math.fsum(math.exp(t) for t in terms)) - sum(positives) / len(positives))
        hits.append(ids[max(score, key=lambda j: score[j])] == ids[i])
    return sum(losses) / max(len(losses), 1), sum(hits) / max(len(hits), 1)


def loop(whole: Embeddings, config: dict[str, Any], taus: list[float]) -> dict[str, float]:
    """Every pair's loss and accuracy, and the weighted total."""
    views, asked = list(whole.z), config.get("pairs", "all")
    if asked == "all":
        pairs = list(combinations(views, 2))
    else:
        pairs = [(asked, v) for v in views if v != asked] if isinstance(asked, str) else asked
    weights = [config.get("weights", {}).get(f"{u}-{v}", 1.0) for u, v in pairs]
    found = {"total": 0.0}
    for index, (u, v) in enumerate(pairs):
        tau = taus[index % len(taus)]
        first = loop_one_direction(whole, u, v, tau, config.get("in_view", False))
        second = loop_one_direction(whole, v, u, tau, config.get("in_view", False))
        found[f"loss/{u}-{v}"] = (first[0] + second[0]) / 2
        found[f"accuracy/{u}-{v}"] = (first[1] + second[1]) / 2
        found["total"] += weights[index] / sum(weights) * found[f"loss/{u}-{v}"]
    return found


def assert_is_loop(losses: Losses, wanted: dict[str, float]) -> None:
    found = {"total": losses.total} | {n: x for n, x in losses.parts.items() if not n.startswith("temperature")}
    assert {n: float(x.detach()) for n, x in found.items()} == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4])
@case_of
def test_value_is_that_of_the_loop(case, k, plain):
    objective, whole = infonce(CASES[case], k), table(k, seed=3, dtype=torch.float64, plain=plain)
    assert_is_loop(objective(whole, whole), loop(whole, CASES[case], objective.log_temperature.exp().tolist()))


def test_listed_pairs_are_taken_as_listed():
    config = {"pairs": PAIRS, "weights": {"view2-view0": 3.0, "view3-view1": 0.0}, "temperature": {"per_pair": True}}
    objective, whole = infonce(config, 4), table(4, dtype=torch.float64)
    assert objective.pairs == PAIRS
    assert_is_loop(objective(whole, whole), loop(whole, config, objective.log_temperature.exp().tolist()))


def test_positive_only_in_another_row():
    # Sample 5 has view0 in one row and view1 in another, as when its views lie in different shards.
    whole = table(2, plain=True, dtype=torch.float64).rows(slice(0, 4))
    present = {"view0": torch.tensor([True, True, False, True]), "view1": torch.tensor([True, False, True, False])}
    whole = whole._replace(ids=torch.tensor([9, 5, 5, 2]), present=present)
    objective = infonce({}, 2)
    wanted = loop(whole, {}, objective.log_temperature.exp().tolist())
    assert wanted["total"] > 0
    assert_is_loop(objective(whole, whole), wanted)


def test_two_views_are_open_clips_loss():
    from open_clip.loss import ClipLoss

    whole = leaves(table(2, plain=True, dtype=torch.float64))
    objective = infonce({"temperature": {"init": 0.05}}, 2)
    a, b = whole.z.values()
    objective(whole, whole).total.backward()
    found = [a.grad, b.grad]
    scale = (1 / objective.log_temperature.exp()).detach()
    wanted = ClipLoss()(a, b, scale)
    torch.testing.assert_close(objective(whole, whole).total, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, list(torch.autograd.grad(wanted, [a, b])), rtol=1e-10, atol=1e-14)


def test_two_views_with_in_view_are_simclrs_loss():
    whole = table(2, plain=True, dtype=torch.float64)
    z = torch.cat(list(whole.z.values()))
    scores = (z @ z.T / 0.5).masked_fill(torch.eye(2 * ROWS, dtype=torch.bool), -torch.inf)
    wanted = cross_entropy(scores, torch.arange(2 * ROWS).roll(ROWS))
    found = infonce({"in_view": True, "temperature": {"init": 0.5}}, 2)(whole, whole).total
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)


def test_temperature_may_be_fixed_and_stays_within_its_bounds():
    fixed = infonce({"temperature": {"learnable": False}}, 2)
    assert not fixed.log_temperature.requires_grad and fixed.log_temperature.shape == (1,)
    assert infonce({"temperature": {"per_pair": True}}, 4).log_temperature.shape == (6,)
    moved, whole = infonce({}, 2), table(2, dtype=torch.float64)
    nn.init.constant_(moved.log_temperature, -20.0)
    assert float(moved(whole, whole).parts["temperature"]) == pytest.approx(0.01)


@pytest.mark.parametrize(("config", "message"), [
    ({"pairs": "vieww0"}, r"unknown view in objective.pairs 'vieww0'; did you mean 'view0'\?"),
    ({"pairs": [("view0", "text")]}, "unknown view in objective.pairs 'text'; known: view0, view1, view2"),
    ({"pairs": [("view0", "view0")]}, "names 'view0' against itself; a pair is two different views"),
    ({"weights": {"view1-view0": 1.0}}, "unknown pair in objective.weights 'view1-view0'; .*known: view0-view1"),
    ({"weights": {"view0-view1": -1.0}}, "objective.weights.view0-view1 is -1.0, weights are not negative"),
    ({"pairs": [("view0", "view1")], "weights": {"view0-view1": 0}}, "leaves no pair with a weight above 0"),
    ({"temperature": {"min": 0}}, "needs 0 < min <= init <= max, got min=0.0"),
    ({"gradient": "scalars", "table": "ring"}, "set table: gather, or gradient: features"),
    ({"temperature": {"init": 5}}, "needs 0 < min <= init <= max, got min=0.01 init=5.0"),
])  # fmt: skip
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        infonce(config, 3)

"""iSogCLR against the loop: individual temperatures as the paper moves them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.objectives.averaged import Slow, assert_gradients, batches
from tests.objectives.checks import build


def clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("in_view", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_values_gradients_and_temperatures_are_those_of_the_loop(k, in_view, published):
    settings = {"init": 0.3, "min": 0.05, "rho": 0.4, "momentum": 0.7, "clip": 1.5, "gamma": {"value": 0.6}}
    objective = build({"kind": "isogclr", "in_view": in_view, "published": published, **settings}, k)
    slow, tau, momentum = Slow(k, 0.6, in_view=in_view), {}, {}
    for whole in batches(k, 5):
        wanted = slow.step(
            whole, lambda name, slot: tau.get((name, slot), 0.3), 0.4, with_positive=published and not in_view
        )
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)
        for key, gradient in wanted.to_own.items():
            momentum[key] = 0.3 * momentum.get(key, 0.0) + 0.7 * clipped(gradient, -1.5, 1.5)
            tau[key] = clipped(tau.get(key, 0.3) - 0.03 * momentum[key], 0.05, 1.0)
    averages: Any = objective.get_submodule("averages")
    ids, rows = averages.store.items()
    fields = rows.view(len(ids), 3, averages.slots)
    kept = {
        (i, s): row[:, s].tolist() for i, row in zip(ids.tolist(), fields, strict=True) for s in range(row.shape[1])
    }
    for key, u in slow.u.items():
        assert kept[key] == pytest.approx([math.log(u), tau[key], momentum[key]], rel=1e-6)
    assert len({round(x, 6) for x in tau.values()}) > 5
    ids, means = objective.temperatures()  # type: ignore[operator]
    one = [kept[int(ids[0]), s][1] for s in range(averages.slots)]
    assert float(means[0]) == pytest.approx(sum(one) / len(one))


def test_temperatures_stay_within_their_bounds_and_are_told():
    objective = build({"kind": "isogclr", "init": 0.1, "min": 0.08, "max": 0.12, "rate": 1.0}, 2)
    parts = {}
    for whole in batches(2, 4):
        parts = objective(whole, whole).parts
    _, tau = objective.temperatures()  # type: ignore[operator]
    assert tau.min() >= 0.08 and tau.max() <= 0.12 and 0.08 <= float(parts["temperature"]) <= 0.12
    assert float(parts["temperature/at_bounds"]) > 0.5


def test_bounds_that_leave_no_start_are_refused():
    with pytest.raises(ValueError, match=r"min <= init <= max, got min=0.2 init=0.1"):
        build({"kind": "isogclr", "min": 0.2}, 2)

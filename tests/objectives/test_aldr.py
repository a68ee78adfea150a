"""ALDR against the loop."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from mvpretrain.distributed import sample_state
from tests.objectives.averaged import Slow, assert_gradients, batches
from tests.objectives.checks import (
    assert_gradient_is_that_of_finite_differences,
    build,
)


@pytest.mark.parametrize("gradient", ["scalars", "features"])
@pytest.mark.parametrize("k", [2, 3])
def test_values_gradients_and_temperatures_are_those_of_the_loop(k, gradient):
    most, alpha, margin = 0.4, 1.5, 0.2
    settings = {"temperature": most, "alpha": alpha, "margin": margin, "gradient": gradient}
    objective, loop = build({"kind": "aldr", **settings}, k), Slow(k, 1.0)
    ways, kept = [(a, c) for u, v in loop.pairs for a, c in ((u, v), (v, u))], {}
    for whole in batches(k, 4):
        h = {(w, i): loop.differences(whole, a, c, i) for w, (a, c) in enumerate(ways) for i in range(12)}
        h = {at: x for at, x in h.items() if x}
        new = defaultdict(list)
        for (w, i), differences in h.items():
            old, count = kept.get((int(whole.ids[i]), w), most), len(differences) + 1
            weights = [1.0, *(math.exp(x.item() / old) for x in differences)]
            p = [x / sum(weights) for x in weights]
            divergence = sum(x * math.log(x * count) for x in p)
            new[int(whole.ids[i]), w].append(most - most * divergence / (alpha * math.log(count)))
        kept |= {key: sum(x) / len(x) for key, x in new.items()}
        total = torch.zeros((), dtype=torch.float64)
        for (w, i), differences in h.items():
            t, count = kept[int(whole.ids[i]), w], len(differences) + 1
            inside = (1 + sum(((margin + x) / t).exp() for x in differences)) / count
            loss = t * torch.as_tensor(inside).log() - alpha * math.log(count) / (2 * most) * (t - most) ** 2
            total = total + loss / len(ways) / sum(at[0] == w for at in h)
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(total.item(), rel=1e-10)
        assert_gradients(whole, total, losses.total)
    ids, rows = next(part for _, part in sample_state.states_in(objective)).items()
    found = {(i, w): float(rows[at, w]) for at, i in enumerate(ids.tolist()) for w in range(len(ways))}
    assert all(found[key] == pytest.approx(t, rel=1e-9) for key, t in kept.items())
    assert max(kept.values()) - min(kept.values()) > 0.01 and min(kept.values()) >= most * (1 - 1 / alpha)


def test_at_one_temperature_the_gradient_is_that_of_finite_differences():
    objective = build({"kind": "aldr", "alpha": 1e9, "temperature": 0.5}, 3).eval()
    assert_gradient_is_that_of_finite_differences(objective, 3)


def test_an_alpha_that_allows_no_temperature_is_refused():
    with pytest.raises(ValueError, match="greater than 1"):
        build({"kind": "aldr", "alpha": 1.0}, 2)

"""Bad pair mining against a loop with a dictionary of histories."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from mvpretrain.distributed import sample_state
from mvpretrain.types import Embeddings
from tests.objectives.averaged import assert_gradients, batches
from tests.objectives.checks import build

TAU = torch.tensor(0.2).log().double().exp().item()  # as a parameter holds it
INFONCE = {"kind": "infonce", "temperature": {"init": 0.2, "learnable": False}}
MINED = {"kind": "dbpm", "objective": INFONCE, "warmup": 2, "noisy": 0.4, "faulty": 0.6}


class Loop:
    """InfoNCE of two views, anchor by anchor."""

    def __init__(self, published: bool):
        self.published, self.steps = published, 0
        self.history: dict[tuple[int, int], tuple[int, float]] = {}

    def step(self, whole: Embeddings) -> tuple[Tensor, list[float]]:
        total, weights, fresh = torch.zeros((), dtype=torch.float64), [], defaultdict(list)
        for w, (a, c) in enumerate((("view0", "view1"), ("view1", "view0"))):
            losses = {i: x for i in range(12) if (x := self.loss(whole, a, c, i)) is not None}
            means = [m for (_, slot), (_, m) in self.history.items() if slot == w]
            mu = sum(means) / len(means) if means else 0.0
            sigma = math.sqrt(sum((m - mu) ** 2 for m in means) / len(means)) if means else 0.0
            for i, loss in losses.items():
                name, weight = int(whole.ids[i]), 1.0
                _, mean = self.history.get((name, w), (0, math.nan))
                if self.steps >= 2 and (mean < mu - 0.4 * sigma or mean > mu + 0.6 * sigma):
                    weight = math.exp(-((loss.item() - mu) ** 2) / (2 * sigma**2))
                    weight /= sigma * math.sqrt(2 * math.pi) if self.published else 1
                weights.append(weight)
                fresh[name, w].append(loss.item())
                total = total + weight * loss / len(losses) / 2
        for key, values in fresh.items():
            visits, mean = self.history.get(key, (0, 0.0))
            self.history[key] = visits + 1, (visits * mean + sum(values) / len(values)) / (visits + 1)
        self.steps += 1
        return total, weights

    def loss(self, whole: Embeddings, a: str, c: str, i: int) -> Tensor | None:
        candidates = [j for j in range(12) if whole.present[c][j]]
        positives = [j for j in candidates if whole.ids[j] == whole.ids[i]]
        if not whole.present[a][i] or not positives:
            return None
        scores = {j: whole.z[a][i] @ whole.z[c][j] / TAU for j in candidates}
        own = torch.stack([scores[j] for j in positives]).mean()
        return torch.stack(list(scores.values())).logsumexp(dim=0) - own


@pytest.mark.parametrize("published", [False, True])
def test_values_gradients_and_histories_are_those_of_the_loop(published):
    objective, loop = build(MINED | {"published": published}, 2), Loop(published)
    lightest = 1.0
    for whole in batches(2, 6):
        losses, (wanted, weights) = objective(whole, whole), loop.step(whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.item(), rel=1e-10)
        assert float(losses.parts["weight"]) == pytest.approx(sum(weights) / len(weights), rel=1e-10)
        assert_gradients(whole, wanted, losses.total)
        lightest = min(lightest, *weights)
    assert lightest < 0.9  # some were weighed
    ids, rows = next(part for _, part in sample_state.states_in(objective)).items()
    for at, name in enumerate(ids.tolist()):
        for w in range(2):
            assert rows[at, w::2].tolist() == pytest.approx(loop.history.get((name, w), (0, 0.0)), rel=1e-10)


def test_nothing_is_weighed_before_the_end_of_the_warm_up():
    mined, plain = build(MINED | {"warmup": 3}, 2), build(INFONCE, 2)
    for step, whole in enumerate(batches(2, 5)):
        same = torch.equal(mined(whole, whole).total, plain(whole, whole).total)
        assert same == (step < 3)


def test_an_objective_that_has_no_pairs_is_refused():
    with pytest.raises(ValueError, match=r"objective\.objective is 'vicreg', whose anchors dbpm cannot weigh"):
        build({"kind": "dbpm", "objective": {"kind": "vicreg"}}, 2)

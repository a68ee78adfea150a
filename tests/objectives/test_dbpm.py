"""Bad pair mining against a loop with a dictionary of histories."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import ProcessGroup
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.testing.tables import part_of, table
from mvpretrain.types import Embeddings
from tests.objectives.averaged import assert_gradients, batches
from tests.objectives.checks import assert_ranks_are_one_process, build

TAU = torch.tensor(0.2).log().double().exp().item()  # as a parameter holds it
INFONCE = {"kind": "infonce", "temperature": {"init": 0.2, "learnable": False}}
REQUIRED = {"objective": {"kind": "infonce"}, "warmup": 1}
VARIANTS: list[dict[str, Any]] = [
    {"objective": {"kind": "dcl"}, "noisy": 0.5, "faulty": 0.5, "published": True},
    {"objective": {"kind": "one_vs_rest"}, "noisy": 0.3, "faulty": 0.3},
]
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
            means = [m for (_, way), (_, m) in self.history.items() if way == w]
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
        there = [j for j in range(12) if whole.present[c][j]]
        positives = [j for j in there if whole.ids[j] == whole.ids[i]]
        if not whole.present[a][i] or not positives:
            return None
        scores = {j: whole.z[a][i] @ whole.z[c][j] / TAU for j in there}
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


def test_ranks_are_one_process(ranks):
    assert_ranks_are_one_process(ranks, MINED | {"objective": {"kind": "infonce"}}, 3)


def recorded(rank: int, size: int) -> tuple[list[float], list[list[float]]]:
    collectives = ProcessGroup() if size > 1 else None
    objective, values = build(MINED, 3, collectives), []
    for step in range(6):
        mine = part_of(table(3, seed=step, dtype=torch.float64), rank, size)
        losses = objective(*(gather_embeddings(mine, collectives) if collectives else (mine, mine)))
        values.append(float(collectives.sum(losses.total.detach()) / size if collectives else losses.total))
    return values, objective.get_buffer("totals").tolist()


def test_values_and_totals_after_some_steps_are_those_of_one_process(ranks):
    values, totals = recorded(0, 1)
    for found, theirs in ranks(4).run(recorded, 4):
        assert found == pytest.approx(values, rel=1e-9)
        for one, other in zip(theirs, totals, strict=True):
            assert one == pytest.approx(other, rel=1e-9)


def test_nothing_is_weighed_before_the_end_of_the_warm_up():
    mined, plain = build(MINED | {"warmup": 3}, 2), build(INFONCE, 2)
    for step, whole in enumerate(batches(2, 5)):
        same = torch.equal(mined(whole, whole).total, plain(whole, whole).total)
        assert same == (step < 3)


def test_an_objective_that_has_no_pairs_is_refused():
    with pytest.raises(ValueError, match=r"objective\.objective is 'vicreg', whose anchors dbpm cannot weigh"):
        build({"kind": "dbpm", "objective": {"kind": "vicreg"}}, 2)

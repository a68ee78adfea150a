"""Symile against loops over its formula, infonce's form at k = 2, and its draws."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mvpretrain.distributed.id_table import splitmix64
from mvpretrain.objectives import _tuples
from mvpretrain.objectives.symile import Symile
from mvpretrain.testing.tables import ROWS, draw, names, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_tiles_change_nothing,
    build,
    floats,
)

NEGATIVES = ["linear", "quadratic"]
negatives_of = pytest.mark.parametrize("negatives", NEGATIVES)


def symile(k: int, negatives: str, **scale: Any) -> Symile:
    objective = build({"kind": "symile", "negatives": negatives, "scale": {"init": 3.0, **scale}}, k)
    assert isinstance(objective, Symile)
    return objective


def drawn(objective: Symile, whole: Embeddings, u: int) -> list[tuple[int, ...]]:
    """The tuples of one anchor view, as rows of the complete ones."""
    orders = objective.orders(_tuples.complete(whole, objective.views), u)
    return list(zip(*(order.tolist() for order in orders)))


def loop(objective: Symile, whole: Embeddings, scale: float) -> dict[str, float]:
    """The docstring's formula, an anchor at a time, in numpy."""
    complete = [i for i in range(len(whole.ids)) if all(whole.present[v][i] for v in whole.z)]
    ids = [int(whole.ids[i]) for i in complete]
    z = [whole.z[v].numpy()[complete] for v in whole.z]
    k, found = len(z), {}
    for u, view in enumerate(whole.z):
        rest = [v for v in range(k) if v != u]
        chosen = list(product(range(len(ids)), repeat=k - 1))
        if objective.config.negatives == "linear":
            chosen = drawn(objective, whole, u)
        losses, hits = [], []
        for i in range(len(ids)):
            positive = scale * math.fsum(np.prod([z[v][i] for v in range(k)], axis=0))
            scores = []
            for t in chosen:
                if any(ids[j] != ids[i] for j in t):
                    rows = [z[v][j] for v, j in zip(rest, t)]
                    scores.append(scale * math.fsum(np.prod([z[u][i], *rows], axis=0)))
            losses.append(math.log(math.exp(positive) + math.fsum(map(math.exp, scores))) - positive)
            hits.append(positive > max(scores))
        found[f"loss/{view}"] = sum(losses) / len(ids)
        found[f"accuracy/{view}"] = sum(hits) / len(ids)
    return found | {"total": sum(found[f"loss/{v}"] for v in whole.z) / k}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize(("k", "negatives"), [(2, "linear"), (3, "linear"), (5, "linear"), (3, "quadratic")])
def test_value_is_that_of_the_loop(k, negatives, plain):
    objective, whole = symile(k, negatives), table(k, seed=3, dtype=torch.float64, plain=plain)
    wanted = loop(objective, whole, 3.0 * 8 ** ((k - 1) / 2))
    assert floats(objective(whole, whole)) == pytest.approx(wanted | {"scale": 3.0}, rel=1e-7)


def test_four_views_take_every_combination_too():
    objective, whole = symile(4, "quadratic", per_dim=False), table(4, dtype=torch.float64).rows(slice(1, 8))
    assert floats(objective(whole, whole))["total"] == pytest.approx(loop(objective, whole, 3.0)["total"], rel=1e-7)


@negatives_of
def test_two_views_are_the_softmax_cross_entropy_of_all_pairs(negatives):
    objective, whole = symile(2, negatives, per_dim=False), table(2, plain=True, dtype=torch.float64)
    scores = 3.0 * whole.z["view0"] @ whole.z["view1"].T
    wanted = (cross_entropy(scores, torch.arange(ROWS)) + cross_entropy(scores.T, torch.arange(ROWS))) / 2
    torch.testing.assert_close(objective(whole, whole).total, wanted, rtol=1e-7, atol=0)


def test_three_way_xor_is_seen_where_no_pair_of_views_says_anything():
    # Signs (a, b, ab): any two of them are independent, and the product of all three is 1.
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    z = {"view0": signs[:, :1], "view1": signs[:, 1:], "view2": signs.prod(dim=1, keepdim=True)}
    whole = Embeddings(z, torch.arange(4), {v: torch.ones(4, dtype=torch.bool) for v in z}, torch.full((4,), -1))
    other = whole._replace(z=z | {"view2": -z["view2"]})
    objective = symile(3, "quadratic")
    assert objective(whole, whole).total < objective(other, other).total - 1


def test_draws_are_permutations_that_change_with_the_step_the_view_and_the_anchor():
    objective, whole = symile(4, "linear"), table(4, plain=True, dtype=torch.float64)
    seen = []
    for _ in range(2):
        for u in range(4):
            for order in zip(*drawn(objective, whole, u)):
                assert sorted(order) == list(range(ROWS))
                seen.append(order)
        objective(whole, whole)
    assert len(set(seen)) == len(seen) == 24


def test_draws_depend_on_ids_and_not_on_places():
    objective, whole = symile(3, "linear"), table(3)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    shuffled = whole.rows(order)
    for u in range(3):
        ordered, mixed = (_tuples.complete(t, names(3)) for t in (whole, shuffled))
        for a, b in zip(objective.orders(ordered, u), objective.orders(mixed, u)):
            torch.testing.assert_close(ordered.z[0][a], mixed.z[0][b], rtol=0, atol=0)


def test_steps_are_counted_in_training_and_saved():
    objective, whole = symile(3, "linear"), table(3, dtype=torch.float64)
    first, second = objective(whole, whole).total, objective(whole, whole).total
    assert first != second and objective.state_dict()["step"].tolist() == [2]
    objective.eval()
    assert objective(whole, whole).total == objective(whole, whole).total
    assert objective.step.dtype == torch.int64 and objective.step.tolist() == [2]


def test_hash_is_splitmix64s():
    def plain(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % 2**64
        return x ^ (x >> 31)

    given = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1, 123456789])
    assert [x % 2**64 for x in splitmix64(given).tolist()] == [plain(x % 2**64) for x in given.tolist()]


@negatives_of
def test_tiles_change_nothing(monkeypatch, negatives):
    assert_tiles_change_nothing(monkeypatch, symile(3, negatives).eval())


def test_scale_is_bounded_and_may_be_fixed():
    assert not symile(3, "linear", learnable=False).log_scale.requires_grad
    objective, whole = symile(3, "linear"), table(3, dtype=torch.float64)
    torch.nn.init.constant_(objective.log_scale, 20.0)
    assert float(objective(whole, whole).parts["scale"]) == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"got min=0\.01 init=50\.0 max=10\.0"):
        symile(3, "linear", init=50.0)


def test_logits_of_random_rows_start_with_a_deviation_of_one():
    for k, d in ((2, 64), (3, 256), (4, 32)):
        rows = normalize(draw(k, k, 4000, d), dim=2)
        assert float(rows.prod(dim=0).sum(dim=1).std()) * d ** ((k - 1) / 2) == pytest.approx(1, abs=0.05)

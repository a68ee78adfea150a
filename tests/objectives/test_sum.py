"""Sums of objectives: against the terms by themselves, in recipes, and every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mvpretrain import objectives, recipe
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.testing._slices import check_slices
from mvpretrain.testing.tables import leaves, table
from mvpretrain.types import Embeddings, Losses
from tests.objectives.checks import (
    build,
    floats,
)
from tests.test_recipe import BASE

TWO = [
    {"objective": {"kind": "infonce"}, "weight": 0.5},
    {"objective": {"kind": "infonce", "temperature": {"init": 0.3}}, "views": ["view1", "view0"], "name": "first two"},
]
MIXED = [
    {"objective": {"kind": "sigmoid", "per_pair": True}, "weight": 2},
    {"objective": {"kind": "infonce", "in_view": True}},
]


class Attraction:
    """A user's own objective, and no module: mean distance of two views' rows."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, local: Embeddings, gathered: Embeddings) -> Losses:
        a, b, *_ = local.z.values()
        value = self.factor * (a - b).square().sum(dim=1).mean()
        return Losses(value, {"value": value.detach()})


def of(*terms: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "sum", "terms": list(terms)}


def only(whole: Embeddings, views: list[str]) -> Embeddings:
    return whole._replace(z={v: whole.z[v] for v in views}, present={v: whole.present[v] for v in views})


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_value_and_gradient_are_the_weighted_terms(k):
    whole = leaves(table(k, seed=3, dtype=torch.float64))
    all_views, two = build({"kind": "infonce"}, k), objectives.build(TWO[1]["objective"], ["view1", "view0"])
    assert isinstance(two, nn.Module)
    first, second = all_views(whole, whole), two.double()(*[only(whole, ["view1", "view0"])] * 2)
    found = build(of(*TWO), k)(whole, whole)
    torch.testing.assert_close(found.total, 0.5 * first.total + second.total, rtol=1e-12, atol=0)
    wanted = {"loss/infonce": first.total.detach(), "loss/first two": second.total.detach()}
    wanted |= {f"infonce/{name}": x for name, x in first.parts.items()}
    wanted |= {f"first two/{name}": x for name, x in second.parts.items()}
    assert {n: float(x) for n, x in found.parts.items()} == pytest.approx({n: float(x) for n, x in wanted.items()})
    assert "first two/loss/view1-view0" in found.parts
    rows = list(whole.z.values())
    gradients = [torch.autograd.grad(x, rows) for x in (found.total, 0.5 * first.total + second.total)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_a_weight_of_zero_is_logged_and_trains_nothing():
    whole = leaves(table(3, dtype=torch.float64))
    objective = build(of({"objective": {"kind": "sigmoid"}, "weight": 0}, {"objective": {"kind": "infonce"}}), 3)
    found = objective(whole, whole)
    found.total.backward()
    assert float(found.parts["loss/sigmoid"]) > 0
    for name, p in objective.named_parameters():
        assert p.grad is not None and (p.grad.abs().max() == 0) == name.startswith("stateful.0."), name


def test_parameters_of_terms_are_its_own_and_a_term_may_be_no_module():
    mine = {"kind": "tests.objectives.test_sum:Attraction", "factor": 3.0}
    attraction = {"objective": mine, "name": "attraction", "views": ["view2", "view1"]}
    objective = build(of(attraction, *MIXED), 3)
    assert set(objective.state_dict()) == {"stateful.1.log_scale", "stateful.1.bias", "stateful.2.log_temperature"}
    whole = table(3, plain=True, dtype=torch.float64)
    found = floats(objective(whole, whole))
    squares = (whole.z["view2"] - whole.z["view1"]).square().sum(dim=1).mean()
    assert found["loss/attraction"] == found["attraction/value"] == pytest.approx(3 * float(squares))


def test_sums_nest():
    whole = table(3, dtype=torch.float64)
    inner = {"objective": of({"objective": {"kind": "sigmoid"}, "weight": 2}), "weight": 0.5}
    found = floats(build(of(inner), 3)(whole, whole))
    assert found["total"] == found["sum/loss/sigmoid"] and "sum/sigmoid/loss/view0-view1" in found
    assert found["total"] == pytest.approx(floats(build({"kind": "sigmoid"}, 3)(whole, whole))["total"])


RING = {"objective": {"kind": "infonce", "table": "ring"}, "name": "ring"}


@pytest.mark.parametrize("more", [[], TWO], ids=["all in the ring", "one in the ring"])
def test_the_table_is_gathered_where_a_term_needs_it(ranks, more):
    config = of(RING, *more)
    assert build(config, 3).gathers(9, 8) == bool(more)  # type: ignore[operator]
    check_slices(objectives.registry.parse(config), ranks(2))


def test_memory_counts_the_gathered_table_once():
    def memory(config: dict[str, Any], k: int) -> int:
        return objectives.registry.parse(config).memory(k, 100, 400, 8)

    table_of = ObjectiveConfig(kind="table").memory
    terms = [{"objective": {"kind": "sigmoid"}}, {"objective": {"kind": "dcl"}, "views": ["view0", "view2"]}]
    assert memory(of(terms[0]), 5) == memory({"kind": "sigmoid"}, 5)
    besides = memory({"kind": "dcl"}, 2) - table_of(2, 100, 400, 8)
    assert memory(of(*terms), 5) == memory({"kind": "sigmoid"}, 5) + besides


@pytest.mark.parametrize(("terms", "message"), [
    ([], "objective.terms is empty; a sum needs a term"),
    ([{**TWO[0], "weight": 0}], "objective.terms all have weight 0"),
    ([{**TWO[0], "weight": -1}], "terms.0.weight.*greater than or equal to 0"),
    ([{**TWO[0], "weight": float("inf")}], "terms.0.weight.*finite"),
    ([TWO[0], TWO[0]], "objective.terms has 2 terms called 'infonce'; give each a name"),
    ([{**TWO[0], "views": ["view0", "vew2"]}], r"view in objective.terms.0.views 'vew2'; did you mean 'view2'\?"),
    ([{**TWO[0], "views": ["view0"]}], r"objective.terms.0.views is \['view0'\]; an objective compares two"),
    ([{**TWO[0], "views": ["view0", "view0"]}], "objective compares two different views or more"),
    ([TWO[0], {"objective": {"kind": "infonce", "pairs": "view2"}, "views": ["view0", "view1"], "name": "x"}],
     r"objective.terms.1 \(x\): unknown view in objective.pairs 'view2'"),
    ([{"objective": {"kind": "infonse"}}], "terms.0.objective.*infonse.*did you mean 'infonce'"),
    ([{"objective": {"kind": "infonce", "par": 1}}], "unknown key 'par'; did you mean 'pairs'"),
    ([{"objective": {"kind": "infonce"}, "wieght": 1}], "unknown key 'wieght'; did you mean 'weight'"),
])  # fmt: skip
def test_wrong_settings_are_refused(terms, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build(of(*terms), 3)


def test_a_recipe_with_a_sum_is_checked_overridden_and_dumped(tmp_path):
    path = tmp_path / "recipe.yaml"
    sum_of_two = "{kind: sum, terms: [{objective: {kind: infonce}}, {objective: {kind: sigmoid, bias: -3}, weight: 2}]}"
    path.write_text(BASE.replace("{kind: infonce}", sum_of_two))
    found = recipe.load(path, ["objective.terms.1.weight=0.25", "objective.terms.0.objective.in_view=true"])
    assert recipe.parse(yaml.safe_load(found.dump())) == found
    terms = yaml.safe_load(found.dump())["objective"]["terms"]
    assert terms[1]["weight"] == 0.25 and terms[1]["objective"]["bias"] == -3
    assert terms[0]["objective"]["in_view"] is True
    with pytest.raises(ValueError, match=r"unknown view in objective.terms.0.views 'c'.*known: a, b") as caught:
        recipe.load(path, ["objective.terms.0.views=[a, c]"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="terms is empty"):
        recipe.load(path, ["objective.terms=[]"])


def test_the_schema_describes_terms():
    whole = json.loads(json.dumps(recipe.schema()))
    term = whole["$defs"]["Term"]["properties"]
    assert term["weight"]["default"] == 1.0 and "objective" in term

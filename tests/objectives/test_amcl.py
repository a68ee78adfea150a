"""AMCL against loops over its formulas with their gradients, and in a whole run."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpretrain
from mvpretrain import objectives, recipe
from mvpretrain.export.write import export_run
from mvpretrain.testing.tables import ROWS, leaves, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)
from tests.objectives.test_barlow import correlation
from tests.test_recipe import BASE

SMALL = {"kind": "amcl", "dim": 8, "heads": 2, "width": 3, "kappa": 2, "beta": 0.7}
ROWWISE: list[dict[str, Any]] = [
    SMALL | {"detach": False},
    SMALL | {"kappa": 30, "heads": 4},
    SMALL | {"base": "infonce", "detach": False},
    SMALL | {"base": "infonce", "kappa": 1, "eta_low": 0.3, "eta_up": 0.3},
    SMALL | {"base": "simsiam"},
    SMALL | {"base": "simsiam", "detach": False},
]
rowwise = pytest.mark.parametrize("config", ROWWISE, ids=str)


def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """Linear, GELU, linear, written out."""
    first, first_bias, second, second_bias = layers.parameters()
    hidden = first @ x + first_bias
    return second @ (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) + second_bias


def number(x: Any) -> float:
    return float(x.detach())


class Loop:
    """The docstring's formula, an anchor, a head and a candidate at a time, in a graph of its own."""

    def __init__(self, objective: Any, whole: Embeddings):
        self.objective, self.whole, self.config = objective, whole, objective.config
        self.alone = self.config.base == "simsiam"
        places = [(v, j, c) for v in whole.z for j in range(len(whole.ids)) for c in range(self.config.heads)]
        rows = {at: self.head(*at) for at in places}
        self.rows = {at: x.detach() if self.alone else x for at, x in rows.items()}
        self.codes = {at: self.code(x) for at, x in self.rows.items()}

    def head(self, v: str, i: int, c: int) -> Tensor:
        width = self.objective.width
        return self.whole.z[v][i, c * width : (c + 1) * width] * self.config.heads**0.5

    def code(self, x: Tensor) -> Tensor:
        return mlp(self.objective.network.phi, x.detach() if self.config.detach else x)

    def cost(self, similarity: Tensor, logit: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        low, up, d = self.config.eta_low, self.config.eta_up, self.objective.width
        tau = low + (up - low) / (1 + torch.exp(-logit))
        return -similarity / tau + beta * (d / 2 * torch.log(tau) + 1 / tau), tau

    def anchor(self, u: str, v: str, i: int) -> dict[str, Any] | None:
        ids, present = self.whole.ids.tolist(), self.whole.present
        rows = [j for j in range(len(ids)) if present[v][j]]
        same, others = [j for j in rows if ids[j] == ids[i]], [j for j in rows if ids[j] != ids[i]]
        if not present[u][i] or not same or (not self.alone and not others):
            return None
        found: dict[str, Any] = {"loss": 0.0, "positive": [], "tau+": [], "negative": [], "tau-": [], "hardest": []}
        for c in range(self.config.heads):
            h = self.head(u, i, c)
            if self.alone:
                h = h + mlp(self.objective.predictors[c].change, h)
                h = h / h.norm()
            similarity, code = {j: h @ self.rows[v, j, c] for j in rows}, self.code(h)
            logit = {j: code @ self.codes[v, j, c] for j in rows}
            own = sum(similarity[j] for j in same) / len(same), sum(logit[j] for j in same) / len(same)
            beta = self.config.beta * (2 if self.alone else 1)
            cost, tau = self.cost(*own, beta)  # type: ignore[arg-type]
            found["positive"].append(number(own[0]))
            found["tau+"].append(number(tau))
            found["loss"] = found["loss"] + cost
            if self.alone:
                continue
            hard = sorted(others, key=lambda j: -number(similarity[j]))[: self.config.kappa]
            priced = [(number(similarity[j]), *self.cost(similarity[j], logit[j], beta)) for j in hard]
            found["tau-"].append([number(x) for _, _, x in priced])
            found["negative"].append([number(similarity[j]) for j in others])
            found["hardest"].append(hard[0])
            if self.config.base == "infonce":
                priced.append((number(own[0]), cost, tau))
                priced = sorted(priced, key=lambda x: -x[0])[: self.config.kappa]
            found["loss"] = found["loss"] - sum(x for _, x, _ in priced) / len(priced)
        return found

    def one_direction(self, u: str, v: str) -> tuple[Tensor, list[dict[str, Any]]]:
        found = [x for i in range(len(self.whole.ids)) if (x := self.anchor(u, v, i)) is not None]
        return sum(x["loss"] for x in found) / len(found), found  # type: ignore[return-value]

    def total(self) -> tuple[Tensor, dict[str, float]]:
        values, parts, ways = [], {}, []
        for u, v in combinations(self.whole.z, 2):
            (first, one), (second, other) = self.one_direction(u, v), self.one_direction(v, u)
            values.append((first + second) / 2)
            parts[f"loss/{u}-{v}"] = number(values[-1])
            figures = [self.figures(x) for x in (one, other)]
            if not self.alone:
                parts[f"accuracy/{u}-{v}"] = sum(x.pop("accuracy") for x in figures) / 2
            ways += figures
        parts |= {name: sum(x[name] for x in ways) / len(ways) for name in ways[0]}
        total = sum(values) / len(values)
        assert isinstance(total, Tensor)
        return total, parts | {"total": number(total)}

    def figures(self, anchors: list[dict[str, Any]]) -> dict[str, float]:
        heads, low, up = range(self.config.heads), self.config.eta_low, self.config.eta_up
        found: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            found.setdefault(name, []).append(value)

        def note_shares(name: str, taus: list[float]) -> None:
            places = [(t - low) / (up - low) if up > low else 0.0 for t in taus]
            for q in range(4):
                note(f"{name}/quarter{q + 1}", sum(min(int(4 * p), 3) == q for p in places) / len(places))
            note(f"{name}/at_low", sum(p < 0.01 for p in places) / len(places))
            note(f"{name}/at_high", sum(p > 0.99 for p in places) / len(places))

        for x in anchors:
            average = sum(x["positive"]) / len(heads)
            note("heads/spread", math.sqrt(sum((s - average) ** 2 for s in x["positive"]) / len(heads)))
            note_shares("temperature/positive", x["tau+"])
            for c in heads:
                note(f"temperature/positive/head{c}", x["tau+"][c])
            if self.alone:
                continue
            note_shares("temperature/negative", [t for head in x["tau-"] for t in head])
            margins = [x["positive"][c] - max(x["negative"][c]) for c in heads]
            for c in heads:
                note(f"temperature/negative/head{c}", sum(x["tau-"][c]) / len(x["tau-"][c]))
                note(f"heads/usage/{c}", float(margins.index(max(margins)) == c))
            pairs = list(combinations(x["hardest"], 2))
            note("heads/shared_negatives", sum(a == b for a, b in pairs) / len(pairs))
            note("accuracy", float(average > max(sum(s) / len(heads) for s in zip(*x["negative"]))))
        return {name: sum(values) / len(anchors) for name, values in found.items()}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3])
@rowwise
def test_value_parts_and_gradients_are_those_of_the_loop(config, k, plain):
    whole = leaves(table(k, seed=3, dtype=torch.float64, plain=plain))
    objective = build(config, k)
    losses, (wanted, parts) = objective(whole, whole), Loop(objective, whole).total()
    assert floats(losses) == pytest.approx(parts, rel=1e-9, abs=1e-12)
    inputs = [*whole.z.values(), *objective.parameters()]
    gradients = [torch.autograd.grad(x, inputs, materialize_grads=True) for x in (losses.total, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    assert any(g.abs().max() > 0 for g in gradients[0][: len(whole.z)])


def barlow_loop(objective: Any, whole: Embeddings) -> dict[str, float]:
    """The docstring's formula, a head and a pair of dimensions at a time."""
    config, d, phi = objective.config, objective.width, objective.network.phi
    found: dict[str, float] = {}
    for u, v in combinations(whole.z, 2):
        both, value, diagonal = whole.present[u] & whole.present[v], 0.0, []
        for c in range(config.heads):
            at = slice(c * d, (c + 1) * d)
            x, y = ((whole.z[w][both][:, at] * (d * config.heads) ** 0.5).T.tolist() for w in (u, v))
            codes = [mlp(phi, code) for code in objective.codes[c]]
            for m in range(d):
                for n in range(d):
                    logit = number(codes[m] @ codes[n])
                    tau = config.eta_low + (config.eta_up - config.eta_low) / (1 + math.exp(-logit))
                    omega = config.beta * (d / 2 * math.log(tau) + 1 / tau)
                    r = correlation(x[m], y[n])
                    value += (1 - r / tau) ** 2 + omega if m == n else config.off_diagonal * r**2 / tau - omega
                    diagonal += [r] if m == n else []
        found |= {f"loss/{u}-{v}": value, f"correlation/{u}-{v}": sum(diagonal) / len(diagonal)}
    losses = [x for name, x in found.items() if name.startswith("loss/")]
    return found | {"total": sum(losses) / len(losses)}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("heads", [1, 2])
def test_barlow_is_that_of_the_loop(heads, plain):
    whole = table(3, seed=3, dtype=torch.float64, plain=plain)
    objective = build(SMALL | {"base": "barlow", "heads": heads, "off_diagonal": 0.1}, 3)
    found = floats(objective(whole, whole))
    temperatures = {name: x for name, x in found.items() if name.startswith("temperature/")}
    assert len(temperatures) == 2 * heads and all(0.5 <= x <= 1.5 for x in temperatures.values())
    assert {n: x for n, x in found.items() if n not in temperatures} == pytest.approx(barlow_loop(objective, whole))


def test_perfect_alignment_is_finite_and_counted():
    whole = orthonormal(3)
    objective = build(SMALL | {"heads": 1, "dim": ROWS}, 3, dim=ROWS)
    losses = objective(whole, whole)
    assert_finite(losses, whole)
    wanted = {name for name in losses.parts if name.startswith("accuracy/")} | {"heads/usage/0"}
    assert [float(losses.parts[name]) for name in wanted] == pytest.approx([1] * 4)


@pytest.mark.parametrize("base", ["simclr", "infonce"])
def test_without_another_sample_there_is_no_loss(base):
    whole = leaves(table(2, plain=True, dtype=torch.float64).rows(slice(2)))
    whole = whole._replace(ids=torch.tensor([4, 4]))
    losses = build(SMALL | {"base": base}, 2)(whole, whole)
    assert_finite(losses, whole)
    assert floats(losses)["total"] == 0


def test_temperatures_take_no_gradient_from_rows_unless_asked():
    """With similarities that do not depend on the rows at all, nothing is left when phi's way is cut."""
    whole = leaves(table(2, plain=True, dtype=torch.float64))
    gradients = []
    for detach in (True, False):
        network = build(SMALL | {"detach": detach}, 2).network
        rows = whole.z["view0"][:, :4]
        code = network(rows)  # type: ignore[operator]
        network.between(code, code).sum().backward()  # type: ignore[union-attr, operator]
        gradients.append(whole.z["view0"].grad is not None)
    assert gradients == [False, True]


def test_listed_pairs_are_all_that_count():
    whole = table(3, dtype=torch.float64)
    parts = build(SMALL | {"pairs": [["view2", "view0"]]}, 3)(whole, whole).parts
    assert [name for name in parts if name.startswith("loss/")] == ["loss/view2-view0"]
    assert floats(build(SMALL | {"pairs": "view1"}, 3)(whole, whole)).keys() >= {"loss/view1-view0", "loss/view1-view2"}


@pytest.mark.parametrize(("bad", "message"), [
    ({"eta_low": 0.5, "eta_up": 0.1}, "needs eta_low <= eta_up, got eta_low=0.5 eta_up=0.1"),
    ({"heads": 3}, "dim=8 does not divide into heads=3; set dim=9"),
    ({"dim": 4}, "objective.dim is 4, and embeddings have dim=8; remove objective.dim"),
    ({"pairs": []}, "objective.pairs is empty"),
    ({"pairs": [["view0", "view0"]]}, "'view0' against itself"),
    ({"pairs": [["view0", "vew1"]]}, r"'vew1'; did you mean 'view1'\?"),
    ({"kappa": 0}, "kappa"),
    ({"eta_low": 0}, "eta_low"),
])  # fmt: skip
def test_wrong_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        objectives.build(SMALL | bad, ["view0", "view1"], dim=8)


def test_a_width_is_needed():
    with pytest.raises(ValueError, match="build it with dim=WIDTH, that of the tables"):
        objectives.build({"kind": "amcl"}, ["a", "b"])


def test_a_sum_knows_heads_and_width_and_refuses_unequal_ones():
    terms = [{"objective": SMALL}, {"objective": SMALL | {"base": "barlow"}, "name": "barlow"}]
    whole = table(2, dtype=torch.float64)
    assert build({"kind": "sum", "terms": terms}, 2)(whole, whole).total.isfinite()
    assert objectives.registry.parse({"kind": "sum", "terms": terms}).projection_heads() == 2
    message = r"ask for unequal numbers of heads \(amcl 2, infonce 1\); make them equal"
    with pytest.raises(ValueError, match=message):
        build({"kind": "sum", "terms": [*terms[:1], {"objective": {"kind": "infonce"}}]}, 2)


@pytest.mark.parametrize("base", ["simclr", "simsiam", "barlow"])
def test_a_recipe_trains_and_exports(tmp_path, base):
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE.replace("{kind: infonce}", f"{{kind: amcl, base: {base}, heads: 3, width: 8}}"))
    here = [f"run={tmp_path}/run", "dim=6", "loader.workers=0", "engine={kind: none, device: cpu, micro_batch: 3}"]
    run = mvpretrain.train(recipe.load(path, [*here, "log={every: 1, tensorboard: false}"]))
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(x["loss"]) for x in steps[:3]) and any(n.startswith("temperature/") for n in steps[0])
    export_run(run, tmp_path / "out")
    rows = mvpretrain.load(tmp_path / "out", view="a").embed([torch.randn(4).numpy() for _ in range(5)])
    torch.testing.assert_close(rows.unflatten(1, (3, 2)).norm(dim=2), torch.full((5, 3), 3**-0.5))

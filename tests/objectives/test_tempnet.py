"""TempNet against the loop at the temperatures that it predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvpretrain import objectives
from tests.objectives.averaged import Slow, assert_gradients, batches
from tests.objectives.checks import (
    assert_gradient_is_that_of_finite_differences,
    build,
)

SMALL = {"kind": "tempnet", "dim": 8, "prototypes": 6, "min": 0.1, "max": 0.9}


def predicted(network: Any, z: torch.Tensor) -> torch.Tensor:
    """Row by row, from the formula."""
    found = []
    for row in z.detach():
        hidden = 1 / (1 + (-(network.project.weight @ row + network.project.bias)).exp())
        logits = torch.stack([hidden @ p / p.norm() for p in network.prototypes])
        soft = (logits / network.log_sharpness.exp()).exp()
        chosen = (soft / soft.sum() - 1 / len(logits)) / (1 + (-logits).exp())
        out = network.read_out.weight[0] @ chosen + network.read_out.bias[0]
        found.append(0.1 + 0.8 / (1 + (-out).exp()))
    return torch.stack(found)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_values_and_gradients_are_those_of_the_loop(gamma):
    torch.manual_seed(0)
    objective: Any = build(SMALL | {"gamma": {"value": gamma}, "rho": 0.5}, 2)
    with torch.no_grad():
        for network in objective.networks:
            network.log_sharpness.fill_(-1.0)
            network.read_out.weight.mul_(20)
    slow, views = Slow(2, gamma), ["view0", "view1"]
    for whole in batches(2, 3):
        tau = {v: predicted(n, whole.z[v]) for v, n in zip(views, objective.networks, strict=True)}
        assert tau["view0"].std() > 0.01
        # Rows of one id have embeddings, and so temperatures, of their own: leave one of each.
        kept = {v: p & first(whole.ids) for v, p in whole.present.items()}
        whole = whole._replace(present=kept)
        row = {name: i for i, name in enumerate(whole.ids.tolist()) if first(whole.ids)[i]}
        known = {(name, s): float(tau[v][i].detach()) for name, i in row.items() for s, v in enumerate(views)}
        wanted = slow.step(whole, lambda name, slot, known=known: known[name, slot], 0.5)
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)
        asked = wanted.to_own
        count = [sum(slot == s for _, slot in asked) for s in range(2)]
        surrogate = torch.stack([g * tau[views[s]][row[name]] / count[s] for (name, s), g in asked.items()]).sum()
        found = torch.autograd.grad(losses.total, list(objective.parameters()))
        slow_found = torch.autograd.grad(surrogate, list(objective.parameters()))
        for one, other in zip(found, slow_found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def first(ids: torch.Tensor) -> torch.Tensor:
    """Whether a row is the first of its id."""
    return torch.stack([(ids[:i] != name).all() for i, name in enumerate(ids)])


def test_nothing_is_kept_with_gamma_1():
    objective: Any = build(SMALL, 2)
    for whole in batches(2, 2):
        objective(whole, whole)
    assert len(objective.averages.store.items()[0]) == 0 and int(objective.averages.steps) == 2


def test_the_gradient_is_that_of_finite_differences():
    """Of the rows by way of the loss alone: the networks see them through a stop-gradient."""
    torch.manual_seed(0)
    objective: Any = build(SMALL | {"dim": 2}, 2, dim=2)
    for network in objective.networks:  # at a constant temperature, rows have no other way
        network.read_out.weight.data.zero_()
        network.requires_grad_(False)
    assert_gradient_is_that_of_finite_differences(objective, 2)


def test_dropout_is_for_training():
    objective: Any = build(SMALL | {"dropout": 0.5}, 2)
    (whole,) = batches(2, 1)
    objective.networks[0].read_out.weight.data.fill_(20)
    values = {float(objective(whole, whole).total.detach()) for _ in range(3)}
    objective.eval()
    assert len(values) == 3 and len({float(objective(whole, whole).total.detach()) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("settings", "words"), [({"dim": 5}, "objective.dim is 5, and embeddings have dim=8"), ({"max": 0.1}, "min < max")]
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build(SMALL | settings, 2)


def test_a_width_that_nobody_tells_is_asked_for():
    with pytest.raises(ValueError, match=r"objective\.dim is missing"):
        objectives.build(SMALL | {"dim": None}, ["a", "b"])

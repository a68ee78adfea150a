"""FastCLIP against the loop, in its four variants, exact and as published."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mvpretrain.objectives._moving_average import Gamma
from tests.objectives.averaged import Slow, assert_gradients, batches
from tests.objectives.checks import (
    build,
)

TAU = {"v0": 0.2, "v1": 0.2, "v3": 0.2}


@pytest.mark.parametrize("in_view", [False, True])
@pytest.mark.parametrize("variant", list(TAU))
@pytest.mark.parametrize("k", [2, 3])
def test_values_and_gradients_are_those_of_the_loop(k, variant, in_view):
    rho = 1.5 if variant == "v3" else 0.0
    settings = {"variant": variant, "in_view": in_view, "rho": rho, "temperature": {"init": 0.2}}
    objective = build({"kind": "fastclip", **settings, "gamma": {"value": 0.4, "decay_steps": 3}}, k)
    with torch.no_grad():
        for p in objective.parameters():
            p.fill_(math.log(0.2))
    slow = Slow(k, 1.0, in_view=in_view)
    for step, whole in enumerate(batches(k, 5)):
        slow.gamma = 0.4 if step > 2 else 0.4 + 0.6 * (1 + math.cos(math.pi * step / 3)) / 2
        wanted = slow.step(whole, lambda name, slot: 0.2, rho, scaled=variant != "v0")
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)
        for p in objective.parameters():
            (found,) = torch.autograd.grad(losses.total, p, retain_graph=True)
            assert float(found) == pytest.approx(0.2 * wanted.to_tau, rel=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_individual_temperatures_take_steps_of_adam(k):
    settings = {"variant": "v2", "rho": 0.4, "rate": 0.01, "clip": 0.3, "temperature": {"init": 0.3, "min": 0.25}}
    objective, slow = build({"kind": "fastclip", **settings, "gamma": {"value": 0.5}}, k), Slow(k, 0.5)
    tau, moments = {}, {}
    for whole in batches(k, 5):
        wanted = slow.step(whole, lambda name, slot: tau.get((name, slot), 0.3), 0.4)
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)
        for key, gradient in wanted.to_own.items():
            m, v, t = moments.get(key, (0.0, 0.0, 0))
            clipped = min(max(gradient, -0.3), 0.3)
            m, v, t = 0.9 * m + 0.1 * clipped, 0.98 * v + 0.02 * clipped**2, t + 1
            moments[key] = m, v, t
            step = m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.98**t)) + 1e-8)
            tau[key] = min(max(tau.get(key, 0.3) - 0.01 * step, 0.25), 1.0)
    averages: Any = objective.get_submodule("averages")
    ids, rows = averages.store.items()
    fields = rows.view(len(ids), 5, averages.slots)
    for at, name in enumerate(ids.tolist()):
        for slot in range(averages.slots):
            if (name, slot) in tau:
                wanted_row = [tau[name, slot], *moments[name, slot]]
                assert fields[at, 1:, slot].tolist() == pytest.approx(wanted_row, rel=1e-9)
    assert objective.temperatures()[1].min() >= 0.25  # type: ignore[operator]


def test_published_v3_halves_all_but_the_inner_part_of_the_gradient_in_tau():
    exact, published = (build({"kind": "fastclip", "published": p, "rho": 2.0}, 2) for p in (False, True))
    (whole,) = batches(2, 1)
    slow, tau = Slow(2, 0.2), 0.07
    wanted = slow.step(whole, lambda name, slot: tau, 2.0)
    gradients = []
    for objective in (exact, published):
        losses = objective(whole, whole)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-9)
        gradients.append(torch.autograd.grad(losses.total, [*whole.z.values(), *objective.parameters()]))
    for one, half in zip(gradients[0][:-1], gradients[1][:-1], strict=True):
        torch.testing.assert_close(half, one / 2)
    outer = wanted.value / tau  # log(eps + u) + rho, both directions
    inner = outer - wanted.to_tau
    assert float(gradients[1][-1]) / tau == pytest.approx(outer / 2 - inner, rel=1e-9)


def test_published_v2_leaves_the_temperature_out_of_the_encoders_gradient():
    config = {"kind": "fastclip", "variant": "v2", "temperature": {"init": 0.3}}
    (whole,) = batches(2, 1)
    found = []
    for published in (False, True):
        losses = build(config | {"published": published}, 2)(whole, whole)
        found.append((losses.total.detach(), *torch.autograd.grad(losses.total, list(whole.z.values()))))
    for scale, exact, published in zip((1.0, 0.3, 0.3), *found, strict=True):
        torch.testing.assert_close(published * scale, exact)


def test_gamma_falls_by_half_a_cosine_and_stays():
    gamma = Gamma(value=0.2, decay_steps=10, every=5)
    assert [gamma.at(step) for step in (0, 4)] == [1.0, 1.0]
    assert gamma.at(5) == pytest.approx(0.6) == gamma.at(9)
    assert gamma.at(10) == gamma.at(99) == 0.2


def test_variants_fill_in_what_is_not_said():
    found: Any = build({"kind": "fastclip", "variant": "v2", "rho": 9.0}, 2)
    assert (found.config.rho, found.config.tau, found.config.temperature.init) == (9.0, "individual", 0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "v4"}, "'v0', 'v1', 'v2' or 'v3'"),
        ({"tau": "individual", "scaled": False}, "is the multiplier of its loss"),
        ({"temperature": {"per_pair": True}}, "remove per_pair"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build({"kind": "fastclip", **settings}, 2)

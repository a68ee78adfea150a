"""SogCLR against the loop and the whole data set, and what it keeps on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import ProcessGroup
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.testing.tables import draw, part_of, table
from tests.objectives.averaged import Slow, assert_gradients, batches
from tests.objectives.checks import (
    build,
    orthonormal,
)

BATCH = {"value": 1.0}


@pytest.mark.parametrize("in_view", [False, True])
@pytest.mark.parametrize("gradient", ["scalars", "features"])
@pytest.mark.parametrize("k", [2, 3])
def test_values_gradients_and_averages_are_those_of_the_loop(k, gradient, in_view):
    settings = {"gamma": {"value": 0.3}, "temperature": 0.2, "eps": 1e-3, "gradient": gradient, "in_view": in_view}
    objective, slow = build({"kind": "sogclr", **settings}, k), Slow(k, 0.3, 1e-3, in_view)
    for whole in batches(k, 4):
        losses, wanted = objective(whole, whole), slow.step(whole, lambda name, slot: 0.2)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)
    ids, rows = objective.get_submodule("averages").store.items()  # type: ignore[operator, union-attr]
    found = {(i, s): float(x) for i, row in zip(ids.tolist(), rows, strict=True) for s, x in enumerate(row.exp())}
    found = {key: x for key, x in found.items() if x == x}
    assert found == pytest.approx(slow.u, rel=1e-10) and len(found) >= 12


def test_published_averages_the_sum_of_two_anchors():
    objective = build({"kind": "sogclr", "in_view": True, "published": True, "gamma": {"value": 0.3}}, 2)
    slow = Slow(2, 0.3, in_view=True, doubled=True)
    for whole in batches(2, 3):
        losses, wanted = objective(whole, whole), slow.step(whole, lambda name, slot: 0.1)
        assert float(losses.total.detach()) == pytest.approx(wanted.value, rel=1e-10)
        assert_gradients(whole, wanted.to_rows, losses.total)


def stated(rank: int, config: dict[str, Any], size: int) -> dict[int, list[float]]:
    """What a rank keeps after 20 steps over ids that come back."""
    collectives = ProcessGroup() if size > 1 else None
    objective = build(config, 3, collectives)
    for step in range(20):
        mine = part_of(table(3, seed=step, dtype=torch.float64), rank, size)
        local, gathered = gather_embeddings(mine, collectives) if collectives else (mine, mine)
        objective(local, gathered)
    ids, rows = next(part for _, part in sample_state.states_in(objective)).items()
    return dict(zip(ids.tolist(), rows.tolist(), strict=True))


def test_state_after_20_steps_is_that_of_one_process(ranks):
    config = {"kind": "fastclip", "variant": "v2", "gamma": {"value": 0.2, "decay_steps": 10, "every": 3}}
    wanted = stated(0, config, 1)
    assert len(wanted) == 12
    parts = ranks(4).run(stated, config, 4)
    assert sum(map(len, parts)) == len(wanted) and sum(bool(part) for part in parts) > 1
    for name, row in (item for part in parts for item in part.items()):
        assert row == pytest.approx(wanted[name], rel=1e-9, nan_ok=True)


def test_the_bias_against_the_whole_data_set_falls_with_gamma():
    """The mean gradient of many batches of 6, against that of the objective over all 24 samples."""
    whole = table(2, plain=True, dtype=torch.float64)
    base = draw(0, 24, 8)
    z = {v: torch.nn.functional.normalize(base + draw(i, 24, 8), dim=1) for i, v in enumerate(whole.z, 1)}
    present = {v: torch.ones(24, dtype=torch.bool) for v in z}
    data = whole._replace(z=z, ids=torch.arange(24), present=present, labels=torch.full((24,), -1))

    def gradient(objective, rows):
        leaf = {v: x.clone().requires_grad_() for v, x in data.z.items()}
        part = data._replace(
            z={v: x[rows] for v, x in leaf.items()},
            ids=data.ids[rows],
            present={v: p[rows] for v, p in present.items()},
            labels=data.labels[rows],
        )
        objective(part, part).total.backward()
        return torch.stack([x.grad for x in leaf.values() if x.grad is not None])

    exact = gradient(build({"kind": "sogclr", "gamma": BATCH}, 2), torch.arange(24))
    make, biases = torch.Generator().manual_seed(0), []
    for gamma in (1.0, 0.3, 0.05):
        objective, total = build({"kind": "sogclr", "gamma": {"value": gamma}}, 2), torch.zeros_like(exact)
        for epoch in range(110):
            batches_of_epoch = torch.randperm(24, generator=make).split(6)
            for rows in batches_of_epoch:
                found = gradient(objective, rows)
                total += found if epoch >= 30 else 0
        # Each batch is a mean over its anchors, as the exact one is over all.
        biases.append(float((total / 320 - exact).norm() / exact.norm()))
    assert biases[0] > 1.4 * biases[1] > 1.4**2 * biases[2], biases


def test_evaluation_leaves_no_trace():
    objective = build({"kind": "sogclr"}, 3).eval()
    whole = batches(3, 1)[0]
    objective(whole, whole)
    store = next(part for _, part in sample_state.states_in(objective))
    assert len(store.items()[0]) == 0 and int(objective.get_buffer("averages.steps")) == 0


def test_perfect_alignment_is_finite():
    whole = orthonormal(3)
    losses = build({"kind": "sogclr", "temperature": 0.005}, 3)(whole, whole)
    losses.total.backward()
    assert losses.total.isfinite() and all(z.grad is not None and z.grad.isfinite().all() for z in whole.z.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": {"value": 0}}, "greater than 0"),
        ({"eps": -1}, "greater than or equal to 0"),
        ({"pairs": [["view0", "text"]]}, "unknown view in objective.pairs 'text'"),
        ({"pairs": []}, "objective.pairs is empty"),
        ({"pairs": [["view0", "view0"]]}, "against itself"),
        ({"gradient": "both"}, "'features' or 'scalars'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build({"kind": "sogclr", **settings}, 3)

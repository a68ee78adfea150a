"""Which parameter moves how fast: groups, decay, and the schedule at its corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mvpretrain import objectives
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.engine.optimizer import OptimizerConfig, build_optimizer, decays, parameter_groups, same_kind
from mvpretrain.engine.schedule import ScheduleConfig, set_rate
from mvpretrain.model.task import Task
from mvpretrain.model.tower import TowerConfig

VIT = {"kind": "vit", "image_size": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2}
TEXT = {"kind": "transformer", "length": 6, "width": 8, "depth": 1, "heads": 2}


def made(**changes: Any) -> tuple[Task, dict[str, TowerConfig]]:
    """An image and a text tower; the text tower's settings are changed."""
    towers = {"image": TowerConfig(encoder=VIT), "text": TowerConfig(encoder=TEXT, **changes)}  # type: ignore[arg-type]
    views = {"image": "image", "text": "text"}
    return Task(views, towers, 4, objectives.build({"kind": "infonce"}, list(views)), SingleProcess()), towers


def settings_of(task: Task, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Parameter name -> (base rate, decay); every parameter must be in one group only."""
    names = {id(p): name for name, p in task.named_parameters()}
    found = [(names[id(p)], (g["base_lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    assert all(g["lr"] == g["base_lr"] for g in groups)
    return dict(found)


def test_matrices_decay_and_nothing_else():
    task, towers = made()
    found = settings_of(task, parameter_groups(task, towers, OptimizerConfig(lr=0.1, weight_decay=0.3)))
    assert found.keys() == dict(task.named_parameters()).keys()
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert {found[name] for name in decayed} == {(0.1, 0.3)}
    still = found.keys() - decayed
    assert all(name.endswith(("bias", "norm.weight", "positions", "token", "log_temperature")) for name in still), still
    assert "towers.text.encoder.tokens.weight" in decayed and "towers.image.head.0.weight" in decayed
    assert {"towers.text.encoder.positions", "towers.image.encoder.positions"} <= still


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("towers.a.encoder.proj.weight", (3, 3), True),
        ("towers.a.encoder.token_embedding.weight", (9, 3), True),  # open_clip's word table
        ("towers.a.encoder.composition.weight", (3, 3), True),
        ("towers.a.encoder.norm.weight", (3,), False),
        ("towers.a.encoder.proj.bias", (3,), False),
        ("towers.a.encoder.cls_token", (1, 1, 3), False),
        ("towers.a.encoder.class_embedding", (1, 3), False),
        ("towers.a.encoder.pos_embed", (1, 9, 3), False),
        ("towers.a.encoder.positional_embedding", (9, 3), False),
        ("towers.a.encoder.attn.relative_position_bias_table", (9, 3), False),
        ("towers.a.encoder.embeddings.position_embeddings.weight", (9, 3), False),  # transformers' BERT
    ],
)
def test_decay_by_the_names_that_libraries_use(name, shape, expected):
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_a_tower_has_its_own_rate_and_decay():
    task, towers = made(lr=0.01, weight_decay=0.0)
    found = settings_of(task, parameter_groups(task, towers, OptimizerConfig(lr=0.1, weight_decay=0.3)))
    assert {found[n] for n in found if n.startswith("towers.text.")} == {(0.01, 0.0)}
    assert {found[n] for n in found if n.startswith("towers.image.")} == {(0.1, 0.3), (0.1, 0.0)}
    assert found["objective.log_temperature"] == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group():
    task, towers = made(freeze=True)
    found = settings_of(task, parameter_groups(task, towers, OptimizerConfig()))
    assert {n for n in found if n.startswith("towers.text.")} == {"towers.text.head.0.weight"}


def test_rates_follow_the_schedule_and_move_the_weights_apart():
    """A step under half the schedule goes half as far, in each group by its own rate."""
    task, towers = made(lr=0.01)
    optimizer = build_optimizer(task, towers, OptimizerConfig(kind="sgd", lr=0.1, weight_decay=0.0))
    set_rate(optimizer, 0.25)
    set_rate(optimizer, 0.5)
    assert sorted(g["lr"] for g in optimizer.param_groups) == [0.005, 0.05]
    moved = {}
    for name, parameter in task.named_parameters():
        parameter.grad, moved[name] = torch.ones_like(parameter), parameter.detach().clone()
    optimizer.step()
    for name, parameter in task.named_parameters():
        rate = 0.005 if name.startswith("towers.text.") else 0.05
        torch.testing.assert_close(parameter.detach(), moved[name] - rate)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({}, {0: 1.0, 50: 0.5, 99: 0.000247, 100: 0.0, 130: 0.0}),
        ({"warmup": 4}, {0: 0.25, 3: 1.0, 4: 1.0, 52: 0.5, 100: 0.0}),
        ({"warmup": 1}, {0: 1.0, 1: 1.0, 100: 0.0}),
        ({"final": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2, 130: 0.2}),
        ({"kind": "constant", "warmup": 2}, {0: 0.5, 1: 1.0, 2: 1.0, 99: 1.0, 130: 1.0}),
        ({"warmup": 100}, {49: 0.5, 99: 1.0, 100: 1.0}),
        ({"warmup": 300}, {0: 1 / 300, 99: 1 / 3}),
    ],
)
def test_schedule_of_a_hundred_steps_at_its_corners(schedule, factors):
    found = {step: ScheduleConfig(**schedule).factor(step, 100) for step in factors}
    assert found == pytest.approx(factors, abs=1e-6)


def test_optimisers_of_torch_timm_and_by_path():
    task, towers = made()
    kinds = {"adamw": "AdamW", "sgd": "SGD", "lamb": "Lamb", "torch.optim:Adagrad": "Adagrad"}
    for kind, name in kinds.items():
        assert type(build_optimizer(task, towers, OptimizerConfig(kind=kind))).__name__ == name
    options = {"betas": (0.9, 0.95)}
    assert build_optimizer(task, towers, OptimizerConfig(options=options)).defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("adamv", {}, ["unknown optimizer kind 'adamv'", "did you mean", "sgd"]),
        ("adamw", {"beta": 1}, ["optimizer.options {'beta': 1}", "'adamw'", "beta"]),
        ("no.such:Thing", {}, ["'no.such:Thing' cannot be loaded"]),
        ("torch.optim:lr_scheduler", {}, ["is a module, a class is needed"]),
    ],
)
def test_what_is_no_optimiser_is_refused_in_words(kind, options, words):
    task, towers = made()
    with pytest.raises(ValueError) as refusal:
        build_optimizer(task, towers, OptimizerConfig(kind=kind, options=options))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_task_with_nothing_to_train_is_refused():
    task, towers = made()
    task.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen; unfreeze a tower or give it a head"):
        build_optimizer(task, towers, OptimizerConfig())


class Needy(torch.optim.SGD):
    """Its constructor wants what it does not keep."""

    def __init__(self, params: Any, lr: float, secret: int):
        super().__init__(params, lr=lr)


def test_an_optimizer_is_built_again_over_other_parameters():
    old, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [old], "lr": 0.5, "base_lr": 0.5}], betas=(0.1, 0.2), weight_decay=0.3)
    again = same_kind(optimizer, [{**optimizer.param_groups[0], "params": [new]}])
    assert type(again) is torch.optim.AdamW and not again.state
    before, after = optimizer.param_groups[0], again.param_groups[0]
    assert after == {**before, "params": [new]} and after["betas"] == (0.1, 0.2)
    with pytest.raises(ValueError, match=r"Needy cannot be built from its defaults .*'secret'; let its constructor"):
        same_kind(Needy([old], 0.1, secret=1), [{"params": [new]}])

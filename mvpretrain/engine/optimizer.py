"""Parameter groups, and the optimiser over them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import nn

from mvpretrain.config import Config, unknown
from mvpretrain.model.task import Task
from mvpretrain.model.tower import TowerConfig
from mvpretrain.registry import import_path, refuse_untrusted


class OptimizerConfig(Config):
    """`adamw`, `sgd`, any name that timm.optim knows (`lamb`, `lars`, ...), or package.module:Class.

    `options` go to its constructor. Biases, norms, embeddings of positions and the objective's parameters are not
    decayed.
    """

    kind: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    options: dict[str, Any] = {}

    @field_validator("kind")
    @classmethod
    def _trusted(cls, value: str) -> str:
        if ":" in value:
            refuse_untrusted(f"optimizer kind {value!r}")
        return value


def build_optimizer(task: Task, towers: Mapping[str, TowerConfig], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over the task's trainable parameters. ValueError: no such optimiser, option or parameter."""
    parameters = parameter_groups(task, towers, config)
    if not parameters:
        raise ValueError("every parameter is frozen; unfreeze a tower or give it a head")
    try:
        return optimizer_class(config.kind)(
            parameters, lr=config.lr, weight_decay=config.weight_decay, **config.options
        )
    except TypeError as error:
        raise ValueError(f"optimizer.options {config.options} do not fit {config.kind!r}: {error}") from error


def optimizer_class(kind: str) -> Any:
    if kind == "adamw":
        return torch.optim.AdamW
    if kind == "sgd":
        return torch.optim.SGD
    if ":" in kind:
        return import_path(kind, "optimizer")
    from timm.optim import get_optimizer_class, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if kind not in known:
        raise ValueError(unknown("optimizer kind", kind, ["adamw", "sgd", *known]))
    return get_optimizer_class(kind, bind_defaults=True)


def same_kind(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """A fresh optimiser of the same class and settings over other parameters.

    `groups` are the optimiser's own, or the first of them, with other `params`. ValueError: its constructor needs an
    argument that it does not keep among its `defaults`, as torch's optimisers do.
    """
    settings = {**optimizer.defaults, **groups[0]}
    asked = [name for name in inspect.signature(type(optimizer)).parameters if name in settings and name != "params"]
    try:
        return type(optimizer)(list(groups), **{name: settings[name] for name in asked})
    except TypeError as error:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be built from its defaults {sorted(optimizer.defaults)}: {error}; "
            "let its constructor hand what it needs to torch.optim.Optimizer as `defaults`"
        ) from error


def parameter_groups(task: Task, towers: Mapping[str, TowerConfig], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and weight decay; each carries its rate as `base_lr` for the schedule."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = towers.get(name.split(".")[1]) if name.startswith("towers.") else None
        lr = tower.lr if tower and tower.lr is not None else config.lr
        decay = tower.weight_decay if tower and tower.weight_decay is not None else config.weight_decay
        found.setdefault((lr, decay if tower and decays(name, parameter) else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), members in found.items()
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense: not for biases, norms, class tokens and positions."""
    *_, module, leaf = name.split(".")
    position = "position" in leaf or "pos_embed" in leaf or (leaf == "weight" and module.startswith("position"))
    return parameter.ndim >= 2 and not position and "token" not in leaf and "class_embedding" not in leaf

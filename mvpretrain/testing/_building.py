"""Objectives as the laws build them, and what they hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvpretrain import objectives
from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.testing._laws import described
from mvpretrain.testing.tables import draw, names
from mvpretrain.types import Objective

DIM = 8  # of embeddings
MOST_VIEWS = 8


def numbers_of_views(config: ObjectiveConfig) -> list[int]:
    """The least three numbers of views that these settings take. ValueError: none up to 8."""
    found = [k for k in range(2, MOST_VIEWS + 1) if config.takes(k)][:3]
    if not found:
        raise ValueError(f"{described(config)} takes no number of views from 2 to {MOST_VIEWS}: see its takes(k)")
    return found


def build(
    config: ObjectiveConfig,
    k: int,
    dtype: torch.dtype,
    collectives: Collectives | None = None,
    spread: bool = False,
    dim: int = DIM,
) -> Objective:
    """The objective from one seed; with `spread`, parameters that would start equal differ."""
    torch.manual_seed(0)
    objective = objectives.build(config, names(k), collectives, dim)
    if spread:
        with torch.no_grad():
            for i, p in enumerate(parameters(objective).values()):
                p += draw(i, *p.shape).to(p) / 7
    return objective.to(dtype) if isinstance(objective, nn.Module) else objective


def parameters(objective: Objective) -> dict[str, nn.Parameter]:
    """The trainable ones by name; none where the objective is no module."""
    found = objective.named_parameters() if isinstance(objective, nn.Module) else ()
    return {name: p for name, p in found if p.requires_grad}


def state_of(objective: Objective) -> dict[str, Tensor]:
    """Copies of all tensors of the state dict, and of the numbers by sample id that this rank holds."""
    if not isinstance(objective, nn.Module):
        return {}
    found = {name: x.detach().clone() for name, x in objective.state_dict().items() if isinstance(x, Tensor)}
    for name, part in sample_state.states_in(objective):
        ids, rows = part.items()
        found |= {f"{name}/ids": ids.clone(), f"{name}/rows": rows.clone()}
    return found

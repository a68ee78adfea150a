"""Linear towers under an objective: the whole batch in one process, and the same on real ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain import objectives
from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.testing.tables import ROWS, draw, ids_and_presence, names, part_of
from mvpretrain.types import Embeddings, Objective

WIDTH, DIM = 5, 8


class Outcome(NamedTuple):
    values: list[float]  # the loss of each step, its mean over ranks
    parts: list[dict[str, float]]
    gradients: dict[str, Tensor]  # of every tower and of the objective's parameters, summed over steps


def build(
    config: dict[str, Any], k: int, dtype: torch.dtype, collectives: Collectives | None = None, dim: int = DIM
) -> Objective:
    torch.manual_seed(0)
    objective = objectives.build(config, names(k), collectives, dim)
    return objective.to(dtype) if isinstance(objective, nn.Module) else objective


def outcome(
    config: dict[str, Any], k: int, dtype: torch.dtype, steps: int = 1, rank: int = 0, size: int = 1
) -> Outcome:
    """Some steps without an optimiser, on new batches whose ids come back, so that an objective's state counts."""
    collectives = ProcessGroup() if size > 1 else SingleProcess()
    objective = build(config, k, dtype, collectives)
    weights = {f"tower/{v}": draw(50 + i, WIDTH, DIM, dtype=dtype).requires_grad_() for i, v in enumerate(names(k))}
    parameters = dict(objective.named_parameters()) if isinstance(objective, nn.Module) else {}
    values, parts = [], []
    for step in range(steps):
        inputs = {v: draw(1000 * step + i, ROWS, WIDTH, dtype=dtype) for i, v in enumerate(names(k))}
        ids, present = ids_and_presence(k, seed=step)
        mine = part_of(Embeddings(inputs, ids, present, torch.full((ROWS,), -1)), rank, size)
        z = {v: normalize(x @ weights[f"tower/{v}"], dim=1) for v, x in mine.z.items()}
        losses = objective(*gather_embeddings(mine._replace(z=z), collectives, getattr(objective, "gathers", None)))
        losses.total.backward()
        values.append(float(mean(losses.total.detach(), collectives)))
        parts.append({name: float(mean(x, collectives)) for name, x in losses.parts.items()})
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in (weights | parameters).items()}
    return Outcome(values, parts, {n: mean(g, collectives) for n, g in gradients.items()})


def mean(x: Tensor, collectives: Collectives) -> Tensor:
    """What an engine does: the average over ranks."""
    return collectives.sum(x) / collectives.size


def outcome_on(rank: int, config: dict[str, Any], k: int, dtype: torch.dtype, steps: int, size: int) -> Outcome:
    return outcome(config, k, dtype, steps, rank, size)


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-6)) for n in wanted}

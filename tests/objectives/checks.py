"""What the objectives' own tests share: building in float64, perfect alignment, numbers that stay finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mvpretrain import objectives
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import _tuples
from mvpretrain.similarity import blockwise
from mvpretrain.testing.tables import ROWS, draw, leaves, names, table
from mvpretrain.types import Embeddings, Losses


def build(config: dict[str, Any], k: int, collectives: Collectives | None = None, dim: int = 8) -> nn.Module:
    """In float64, with parameters that differ where there are several."""
    objective = objectives.build(config, names(k), collectives, dim)
    assert isinstance(objective, nn.Module)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.arange(p.numel()).view_as(p) / 7)
    return objective.double()


def floats(losses: Losses) -> dict[str, float]:
    found = {"total": losses.total} | losses.parts
    return {name: float(x.detach()) for name, x in found.items()}


def orthonormal(k: int) -> Embeddings:
    """Perfect alignment: every view of a row is the same, and rows are orthogonal."""
    rows = torch.linalg.qr(draw(3, ROWS, ROWS))[0]
    return leaves(table(k, plain=True, dtype=torch.float64)._replace(z=dict.fromkeys(names(k), rows)))


def assert_gradient_is_that_of_finite_differences(objective: nn.Module, k: int, labels: Tensor | None = None) -> None:
    whole = table(k, seed=3, dim=2, dtype=torch.float64).rows(slice(0, 8))
    whole = whole if labels is None else whole._replace(labels=labels)
    state = {name: p.detach().clone().requires_grad_() for name, p in objective.named_parameters()}

    def total(*given: Tensor) -> Tensor:
        gathered = whole._replace(z=dict(zip(whole.z, given)))
        return functional_call(objective, dict(zip(state, given[k:])), (gathered, gathered)).total

    # fast_mode: along one random direction instead of every axis.
    assert torch.autograd.gradcheck(total, (*leaves(whole).z.values(), *state.values()), fast_mode=True)


def assert_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, objective: nn.Module) -> None:
    """Gradients in tiles that fit neither the rows nor each other are those in one tile."""
    whole = leaves(table(3, dtype=torch.float64))
    inputs = [*whole.z.values(), *objective.parameters()]
    wanted = torch.autograd.grad(objective(whole, whole).total, inputs)
    for module, name, size in ((blockwise, "ROWS", 5), (blockwise, "COLUMNS", 4), (_tuples, "TILE", 3)):
        monkeypatch.setattr(module, name, size)
    found = torch.autograd.grad(objective(whole, whole).total, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def assert_finite(losses: Losses, whole: Embeddings) -> None:
    """Also on the way: a NaN that a mask takes out again would stop everyone who looks for another one."""
    with torch.autograd.set_detect_anomaly(True):
        losses.total.backward()
    assert losses.total.isfinite() and all(x.isfinite() for x in losses.parts.values())
    assert all(z.grad is not None and z.grad.isfinite().all() for z in whole.z.values())

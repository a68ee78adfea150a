"""bfloat16 on CPUs: where it computes, and where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvpretrain.engine import encoding
from mvpretrain.types import Losses
from tests.engine.small import batch_of, engine_of, optimizer_of, rows_of, task_of


class Spy(torch.nn.Module):
    """An objective that notes in which precision it is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, local: Any, gathered: Any) -> Losses:
        product = local.z["v0"] @ gathered.z["v1"].T
        self.seen += [torch.is_autocast_enabled("cpu"), str(product.dtype), str(local.z["v2"].dtype)]
        return Losses(product.square().mean() + (local.z["v0"] - local.z["v2"]).square().mean(), {})


def two_steps(rank: int, kind: str, precision: str, spy: bool) -> dict[str, Any]:
    objective = Spy() if spy else None
    inside: list[str] = []
    engine = engine_of(
        kind,
        lambda collectives: task_of(3, torch.float32, collectives, objective),
        optimizer_of,
        precision=precision,
        clip=1.0,
    )
    linear = next(m for m in engine.task.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: inside.append(str(output.dtype)))
    mine = rows_of(batch_of(3), rank, engine.world.size)
    steps = [engine.step(mine) for _ in range(2)]
    with encoding(engine) as task:
        z = task.encode(mine).z["v0"]
    return {
        "losses": [step.loss for step in steps],
        "stepped": all(step.stepped for step in steps),
        "parameters": {str(p.dtype) for p in engine.task.parameters()},
        "weights": {str(w.dtype) for w in engine.weights().values()},
        "inside": set(inside),
        "embeddings": str(z.dtype),
        "spied": objective.seen if objective else [],
    }


def assert_bf16_beside_fp32(bf16: dict[str, Any], fp32: dict[str, Any]) -> None:
    assert bf16["stepped"] and bf16["parameters"] == {"torch.float32"} and bf16["weights"] <= {"torch.float32"}
    assert bf16["inside"] == {"torch.bfloat16"} and fp32["inside"] == {"torch.float32"}
    assert bf16["embeddings"] == "torch.float32"
    # Similarities err by 2^-8 or so, and are divided by a temperature of 0.2.
    assert bf16["losses"] == pytest.approx(fp32["losses"], abs=0.05) and bf16["losses"] != fp32["losses"]


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_bf16_keeps_parameters_and_embeddings_in_float32(ranks, kind):
    for bf16, fp32 in zip(*(ranks(2).run(two_steps, kind, precision, False) for precision in ("bf16", "fp32"))):
        assert_bf16_beside_fp32(bf16, fp32)


def test_bf16_in_one_process():
    assert_bf16_beside_fp32(two_steps(0, "none", "bf16", False), two_steps(0, "none", "fp32", False))


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_objectives_compute_in_float32_whatever_the_precision(ranks, kind):
    for answer in ranks(2).run(two_steps, kind, "bf16", True):
        assert answer["spied"] == [False, "torch.float32", "torch.float32"] * 2
        assert answer["inside"] == {"torch.bfloat16"}


def offloaded(rank: int, kind: str, offload: bool) -> tuple[list[float], set[str]]:
    import sys

    engine = engine_of(kind, None, optimizer_of, offload=offload, clip=1.0)
    mine = rows_of(batch_of(3), rank, 2)
    losses = [engine.step(mine).loss for _ in range(3)]
    assert bool(engine.model.zero_cpu_offload()) is offload
    return losses, {name for name in sys.modules if "cpu_adam" in name and not name.startswith("deepspeed")}


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_offload_steps_the_same_without_compiling_anything(ranks, kind):
    (plain, _), (moved, compiled) = (ranks(2).run(offloaded, kind, offload, timeout=30)[0] for offload in (False, True))
    assert moved == pytest.approx(plain, rel=1e-6) and not compiled

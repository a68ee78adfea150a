"""The same steps on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.engine.small import batch_of, engine_of, optimizer_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def three_steps(kind: str, device: str, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = engine_of(kind, None, optimizer_of, device=device, precision=precision, clip=1.0)
    steps = [engine.step(batch_of(3).to(engine.world.device)) for _ in range(3)]
    assert all(step.stepped for step in steps)
    return [step.loss for step in steps], engine.weights()


@pytest.mark.parametrize("kind", ["none", "zero2", "zero3"])
def test_steps_on_a_gpu_are_those_on_the_cpu(kind):
    (wanted, there), (found, here) = three_steps("none", "cpu", "fp32"), three_steps(kind, "cuda", "fp32")
    assert found == pytest.approx(wanted, abs=1e-4)
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["none", "zero2", "zero3"])
def test_half_precision_steps_on_a_gpu(kind, precision):
    losses, weights = three_steps(kind, "cuda", precision)
    assert losses == pytest.approx(three_steps("none", "cpu", "fp32")[0], abs=0.05)
    assert {w.dtype for w in weights.values()} == {torch.float32}

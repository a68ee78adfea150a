"""The same steps on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.engine.small import batch_of, engine_of, optimizer_of, task_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def three_steps(
    kind: str, device: str, precision: str, micro_batch: int | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = engine_of(kind, None, optimizer_of, device=device, precision=precision, clip=1.0, micro_batch=micro_batch)
    steps = [engine.step(batch_of(3)) for _ in range(3)]
    assert all(step.stepped for step in steps)
    return [step.loss for step in steps], engine.weights()


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("kind", ["none", "zero0", "zero2", "zero3"])
def test_steps_on_a_gpu_are_those_on_the_cpu(kind, micro_batch):
    wanted, there = three_steps("none", "cpu", "fp32")
    found, here = three_steps(kind, "cuda", "fp32", micro_batch)
    assert found == pytest.approx(wanted, abs=1e-4)
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["none", "zero0", "zero2", "zero3"])
def test_half_precision_steps_on_a_gpu(kind, precision, micro_batch):
    losses, weights = three_steps(kind, "cuda", precision, micro_batch)
    assert losses == pytest.approx(three_steps("none", "cpu", "fp32")[0], abs=0.05)
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["none", "zero0", "zero2", "zero3"])
def test_the_loss_scale_of_fp16_leaves_the_gradient_as_it_is(kind):
    """Both passes together: what is scaled once on the way down is unscaled once."""
    changes = {}
    for micro_batch in (None, 5):
        engine = engine_of(kind, device="cuda", precision="fp16", micro_batch=micro_batch)
        before, done = engine.weights(), [engine.step(batch_of(3)) for _ in range(3)][-1]
        assert done.stepped or done.norm is not None
        changes[micro_batch] = {name: engine.weights()[name] - value for name, value in before.items()}
    for name, change in changes[None].items():
        assert (changes[5][name] - change).norm() < 0.05 * change.norm() + 1e-3, name


def test_dropout_on_a_gpu_is_the_same_in_both_passes():
    """A gradient step on embeddings that dropout has drawn differently would not be the step of their loss."""
    seen: list[torch.Tensor] = []
    dropout = {"dropout": 0.5}
    engine = engine_of("none", lambda x: task_of(3, torch.float32, x, encoder=dropout), device="cuda", micro_batch=5)
    engine.task.towers["t0"].register_forward_hook(lambda *call: seen.append(call[2].detach()))
    engine.step(batch_of(3))
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:]))
    assert not torch.equal(seen[0], seen[1])

"""Inside its bounds bounded_exp is exp; at them the gradient that leads back survives, and only that one."""

from __future__ import annotations

import math

import pytest
import torch

from mvpretrain.objectives._temperature import bounded_exp

LOW, HIGH = 0.01, 1.0


def gradient(log_value: float, upstream: float) -> float:
    x = torch.tensor([log_value], dtype=torch.float64, requires_grad=True)
    (bounded_exp(x, LOW, HIGH) * upstream).backward()
    assert x.grad is not None
    return float(x.grad)


def test_value_is_clamped():
    x = torch.tensor([[-9.0, math.log(0.3)], [0.0, 4.0]], dtype=torch.float64)
    wanted = torch.tensor([[LOW, 0.3], [1.0, HIGH]], dtype=torch.float64)
    torch.testing.assert_close(bounded_exp(x, LOW, HIGH), wanted)


def test_gradient_inside_is_exact():
    x = torch.tensor([-4.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bounded_exp(x, LOW, HIGH), [x])


@pytest.mark.parametrize(
    ("log_value", "upstream", "wanted"),
    [
        # A descent step goes against the gradient: a negative one raises the value.
        (math.log(HIGH), -2.0, 0.0),
        (math.log(HIGH), 2.0, 2 * HIGH),
        (math.log(HIGH) + 3, -2.0, 0.0),
        (math.log(HIGH) + 3, 2.0, 2 * HIGH),
        (math.log(LOW), 2.0, 0.0),
        (math.log(LOW), -2.0, -2 * LOW),
        (math.log(LOW) - 3, 2.0, 0.0),
        (math.log(LOW) - 3, -2.0, -2 * LOW),
    ],
)
def test_gradient_at_and_beyond_a_bound(log_value, upstream, wanted):
    assert gradient(log_value, upstream) == pytest.approx(wanted, rel=1e-12)


def test_descent_comes_back_from_beyond_a_bound():
    x = torch.tensor([2.0], requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        ((bounded_exp(x, LOW, HIGH) - 0.5) ** 2).sum().backward()
        optimizer.step()
    assert float(bounded_exp(x, LOW, HIGH).detach()) == pytest.approx(0.5, abs=0.05)

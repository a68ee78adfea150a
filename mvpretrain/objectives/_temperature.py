"""exp of a learnable logarithm, kept within bounds that the parameter can come back from."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def bounded_exp(log_value: Float[Tensor, "*s"], low: float, high: float) -> Float[Tensor, "*s"]:
    """exp(log_value) clamped to [low, high].

    A clamp's gradient is zero outside its bounds, so a parameter that momentum carried past one would stay there for
    ever. Here the gradient is dropped only where a descent step would lead further out.
    """
    return _BoundedExp.apply(log_value, math.log(low), math.log(high))  # type: ignore[return-value]


class _BoundedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        value = x.clamp(low, high).exp()
        ctx.save_for_backward(x, value)
        ctx.bounds = (low, high)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, value = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return (grad * value).masked_fill(outward, 0), None, None

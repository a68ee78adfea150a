"""A temperature for every pair: the variance that a small network expects of the pair's difference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

QUARTERS = 4
NEAR = 0.01  # part of the range of temperatures: one as near to a bound counts as at it


class TemperatureNetwork(nn.Module):
    """phi, an MLP `* d -> * w`: the product of two of its outputs gives their pair a temperature in [low, up].

    tau = low + (up - low) sigmoid(<phi(x), phi(y)>), Wang et al. 2024 (arXiv 2310.05615). `detach`: x without gradient.
    """

    def __init__(self, inputs: int, width: int, low: float, up: float, detach: bool):
        super().__init__()
        self.low, self.up, self.detach = low, up, detach
        self.phi = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s w"]:
        return self.phi(x.detach() if self.detach else x)

    def between(self, one: Float[Tensor, "*#s w"], other: Float[Tensor, "*#s w"]) -> Float[Tensor, "*#s"]:
        """The temperatures of pairs, from two outputs of `forward`."""
        return self.low + (self.up - self.low) * (one * other).sum(dim=-1).sigmoid()


class NearIdentity(nn.Module):
    """x + MLP(x): a predictor that begins near the identity."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.change = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, inputs))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x + self.change(x)


class Scored(NamedTuple):
    """The cosines of some pairs, and their temperatures."""

    similarity: Float[Tensor, "*s"]
    temperature: Float[Tensor, "*s"]

    def cost(self, beta: float, dim: int) -> Float[Tensor, "*s"]:
        """-s / tau + beta Omega(tau), of unit vectors of `dim` numbers.

        For beta 1 it is, but for a constant, the negative log-likelihood of their difference under a Gaussian of
        variance tau in every dimension.
        """
        return -self.similarity / self.temperature + beta * omega(self.temperature, dim)


def omega(temperature: Float[Tensor, "*s"], dim: int) -> Float[Tensor, "*s"]:
    """(dim / 2) log tau + 1 / tau."""
    return dim / 2 * temperature.log() + 1 / temperature


def histogram(
    temperature: Float[Tensor, "b h k"], weight: Float[Tensor, "b h k"], low: float, up: float
) -> dict[str, Float[Tensor, " b"]]:
    """By name, the part of each row's temperatures in each quarter of [low, up], and of those at either bound."""
    position = (temperature - low) / (up - low) if up > low else torch.zeros_like(temperature)
    quarter = (position * QUARTERS).long().clamp(0, QUARTERS - 1)
    inside = {f"quarter{q + 1}": quarter == q for q in range(QUARTERS)}
    inside |= {"at_low": position < NEAR, "at_high": position > 1 - NEAR}
    count = weight.sum(dim=(1, 2)).clamp_min(1)
    return {name: (where * weight).sum(dim=(1, 2)) / count for name, where in inside.items()}


def agreement(chosen: Int[Tensor, "b h"]) -> Float[Tensor, " b"]:
    """For each row, the part of the pairs of heads that have chosen the same; 0 for one head."""
    heads = chosen.shape[1]
    same = (chosen[:, :, None] == chosen[:, None]).sum(dim=(1, 2)).double() - heads
    return same / max(heads * (heads - 1), 1)

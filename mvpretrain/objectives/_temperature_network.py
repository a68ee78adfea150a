"""A temperature for every pair, from the product of two codes, and the predictors that stand before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLAT = 1e-5  # added to variances


class TemperatureNetwork(nn.Module):
    """phi, an MLP `* d -> * w`: the product of two of its outputs, their codes, gives their pair a temperature.

    tau = low + (up - low) sigmoid(-<phi(x), phi(y)>), Wang et al. 2024 (arXiv 2310.05615; the sign is that of their
    code). The product of a row with itself is never negative: rows that are alike begin with temperatures below the
    middle of the range. `detach`: x without gradient.
    """

    def __init__(self, inputs: int, width: int, outputs: int, bounds: tuple[float, float], detach: bool):
        super().__init__()
        self.low, self.up = bounds
        self.detach = detach
        self.phi = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s w"]:
        return self.phi(x.detach() if self.detach else x)

    def between(self, one: Float[Tensor, "*#s w"], other: Float[Tensor, "*#s w"]) -> Float[Tensor, "*#s"]:
        """The temperatures of pairs, from their codes."""
        return self.temperature((one * other).sum(dim=-1))

    def across(self, one: Float[Tensor, "*s m w"], other: Float[Tensor, "*s n w"]) -> Float[Tensor, "*s m n"]:
        """The temperatures of each of the one with each of the other."""
        return self.temperature(one @ other.transpose(-1, -2))

    def temperature(self, product: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self.low + (self.up - self.low) * (-product).sigmoid()


class NearIdentity(nn.Module):
    """x + MLP(x): a predictor that begins near the identity."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.change = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, inputs))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x + self.change(x)


class NormedPredictor(nn.Module):
    """Linear, batch norm, ReLU, linear, with a quarter of the width between (Chen & He 2021, SimSiam).

    It is given the rows of every rank, so that the statistics are those of the whole batch: one row is allowed. State:
    running mean and variance, with which rows are normed in evaluation.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, inputs: int):
        super().__init__()
        width = max(inputs // 4, 1)
        self.first, self.second = nn.Linear(inputs, width, bias=False), nn.Linear(width, inputs)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        hidden = self.first(x)
        mean, variance = self.mean, self.variance
        if self.training and len(x):
            mean, variance = hidden.mean(dim=0), hidden.var(dim=0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * len(x) / max(len(x) - 1, 1), 0.1)
        normed = (hidden - mean) / (variance + FLAT).sqrt()
        return self.second((normed * self.weight + self.bias).relu())


class Scored(NamedTuple):
    """The cosines of some pairs, and their temperatures."""

    similarity: Float[Tensor, "*s"]
    temperature: Float[Tensor, "*s"]

    def cost(self, beta: float, dim: int) -> Float[Tensor, "*s"]:
        """-s / tau + beta Omega(tau), of unit vectors of `dim` numbers.

        For beta 1 it is, but for a constant, the negative log-likelihood of their difference under a Gaussian of
        variance tau in every dimension.
        """
        scaled = -self.similarity / self.temperature
        return scaled + beta * omega(self.temperature, dim) if beta else scaled


def omega(temperature: Float[Tensor, "*s"], dim: int) -> Float[Tensor, "*s"]:
    """(dim / 2) log tau + 1 / tau."""
    return dim / 2 * temperature.log() + 1 / temperature

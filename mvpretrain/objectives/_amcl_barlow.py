"""amcl's Barlow Twins: temperatures for pairs of dimensions, ours and the authors'."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mvpretrain.objectives._correlations import correlations, off_diagonal
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._temperature_network import TemperatureNetwork, omega
from mvpretrain.types import Embeddings, Losses

TINY = 1e-12  # added to the authors' variances, where a dimension is the same in all rows


class BarlowAMCL(nn.Module):
    """Mean over pairs {u, v} and heads of adaptive Barlow Twins (see `AMCL`), on the gathered batch. With C the d' x d'
    matrix of correlations between the dimensions of a head in the two views:

        sum_l (1 - C_ll / tau_ll)^2 + lambda sum_(l != m) C_lm^2 / tau_lm
            + beta sum_l Omega(tau_ll) - beta sum_(l != m) Omega(tau_lm)

    Every dimension of every head has a learned code of d' numbers, which phi reads as it reads rows elsewhere; tau_lm
    is that of the codes of l and m. A correlation's best is tau, not 1: bounds below 1 leave dimensions less than fully
    correlated. Correlations are those of the kind `barlow`; a pair with fewer than two rows is 0.

    `published`: the authors' code, version 2.0. The sum over heads; phi reads the batch's channel vectors (a
    dimension's values in all rows of a view, times sqrt(d')), so that it is built for `batch` rows of the gathered
    table: rows that are missing count as zeros, and more are refused. C has variances over n - 1 and is divided by n.
    The order of samples matters to it. The authors' channels are those of rows of any length; ours have length one.

    Cost: n d d' multiplications a pair, and `published` d batch width. State: phi and, if ours, the codes.
    """

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        heads: int,
        width: int,
        network: TemperatureNetwork,
        beta: float,
        off_diagonal: float,
        batch: int | None,
    ):
        super().__init__()
        self.pairs, self.heads, self.width, self.network, self.batch = pairs, heads, width, network, batch
        self.beta, self.off_diagonal = beta, off_diagonal
        # Codes have no encoder whose rows the temperatures could move: they are learned from their gradient.
        self.codes = None if batch else nn.Parameter(torch.randn(heads, width, width) / width**0.5)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        parts: dict[str, Tensor] = {}
        values, temperatures = [], []
        for u, v in self.pairs:
            both = gathered.present[u] & gathered.present[v]
            x, y = self.channels(gathered.z[u][both]), self.channels(gathered.z[v][both])  # h m d
            temperature = self.temperature(x, y)
            correlation = torch.stack([self.correlation(a, b) for a, b in zip(x, y)])
            by_head = self.loss(correlation, temperature)
            values.append((by_head.sum() if self.batch else by_head.mean()) * (both.sum() > 1))
            temperatures.append(temperature.detach())
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            parts[f"correlation/{u}-{v}"] = correlation.diagonal(dim1=1, dim2=2).mean().detach()
        tau = torch.stack(temperatures).mean(dim=0)
        parts |= {f"temperature/own/head{c}": x.diagonal().mean() for c, x in enumerate(tau)}
        parts |= {f"temperature/others/head{c}": x.sum() / max(len(x), 1) for c, x in enumerate(off_diagonal(tau))}
        return Losses(torch.stack(values).mean(), parts)

    def loss(self, correlation: Float[Tensor, "h d d"], temperature: Float[Tensor, "h d d"]) -> Float[Tensor, " h"]:
        own, others = temperature.diagonal(dim1=1, dim2=2), off_diagonal(temperature)
        diagonal = (1 - correlation.diagonal(dim1=1, dim2=2) / own).square().sum(dim=1)
        squares = (off_diagonal(correlation).square() / others).sum(dim=1)
        price = omega(own, self.width).sum(dim=1) - omega(others, self.width).sum(dim=1)
        return diagonal + self.off_diagonal * squares + self.beta * price

    def channels(self, z: Float[Tensor, "m n"]) -> Float[Tensor, "h m d"]:
        """Rows by head, of length one."""
        return z.unflatten(1, (self.heads, self.width)).movedim(1, 0) * self.heads**0.5

    def temperature(self, x: Float[Tensor, "h m d"], y: Float[Tensor, "h m d"]) -> Float[Tensor, "h d d"]:
        if self.codes is not None:
            code = self.network(self.codes)
            return self.network.across(code, code)
        assert self.batch is not None
        if x.shape[1] > self.batch:
            raise ValueError(
                f"the gathered batch has {x.shape[1]} rows, and phi was built for batch={self.batch}; set "
                f"objective.batch={x.shape[1]}"
            )
        # phi is linear at its entrance: where rows are missing, zeros are as good as none.
        missing = self.batch - x.shape[1]
        one, other = (
            self.network(nn.functional.pad(r.transpose(1, 2) * self.width**0.5, (0, missing))) for r in (x, y)
        )
        return self.network.across(one, other)

    def correlation(self, x: Float[Tensor, "m d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
        if self.codes is not None:
            return correlations(x, y)
        return _standardised(x).T @ _standardised(y) / max(len(x), 1)


def _standardised(x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Columns with mean 0 and variance 1, over m - 1; the scale of x does not matter."""
    centred = (x - x.sum(dim=0) / max(len(x), 1)) * x.shape[1] ** 0.5
    return centred / (centred.square().sum(dim=0) / max(len(x) - 1, 1) + TINY).sqrt()

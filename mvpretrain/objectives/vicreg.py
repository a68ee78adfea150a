"""VICReg for k views: variance, invariance, covariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.types import Embeddings, Losses

FLAT = 1e-4  # added to variances, as in the paper: a root has no gradient at 0


class VicregConfig(ObjectiveConfig):
    """The three terms' weights, and the standard deviation below which the variance term pulls."""

    kind: Literal["vicreg"] = "vicreg"
    invariance: float = Field(default=25.0, ge=0, allow_inf_nan=False)
    variance: float = Field(default=25.0, ge=0, allow_inf_nan=False)
    covariance: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    deviation: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"invariance": 5.0, "variance": 10.0, "covariance": 2.0, "deviation": 0.9}]

    def build(self, views: Sequence[str], collectives: Collectives) -> Vicreg:
        return Vicreg(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        tables = 6 * gathered * views * dim * 4  # scaled, centred, their distances to the mean, and gradients
        return super().memory(views, rows, gathered, dim) + tables + 3 * views * dim**2 * 4


class Vicreg(nn.Module):
    """VICReg of Bardes et al. 2022 (ICLR), its mean over the pairs of k views, exact on the gathered batch.

    It is defined on rows of any length; ours have length one and are read as x = sqrt(d) z, with a mean square of one a
    dimension. With n rows, S_j the standard deviation of dimension j and C the covariance matrix of a view:

        s(u, v) = (1/n) sum_i |x_i^u - x_i^v|^2 / d          invariance
        v(u)    = (1/d) sum_j max(0, 1 - S_j(x^u))           variance,   S = sqrt(Var + 1e-4), Var over n - 1
        c(u)    = (1/d) sum_(i != j) C_ij(x^u)^2             covariance

        L = 25 mean_(pairs u, v) s(u, v) + (2/k) sum_u [ 25 v(u) + 1 c(u) ]

    With k = 2 this is lambda s + mu (v + v') + nu (c + c'). The mean over pairs is not taken pair by pair: the squared
    distances between the k views of a row add up to k times those to their mean. The authors' code halves each variance
    term, which is not done here: `variance: 12.5` has its weights.

    A view counts over the rows that have it (0 where fewer than two do), a pair over the rows that have both, and a row
    with more views for more pairs. Rows of equal ids are rows as any other. Every rank computes the whole batch's
    value: k n d^2 multiplications; memory O(k n d + k d^2).
    """

    def __init__(self, config: VicregConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.views = config, list(views)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        z = torch.stack([gathered.z[v] for v in self.views], dim=1)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        present = torch.stack([gathered.present[v] for v in self.views], dim=1)
        invariance = distance_between_views(z, present)
        scaled, deviation = z * z.shape[2] ** 0.5, self.config.deviation
        terms = [variance_and_covariance(x[p], deviation) for x, p in zip(scaled.unbind(1), present.unbind(1))]
        variance, covariance = (torch.stack(term).mean() for term in zip(*terms))
        c = self.config
        total = c.invariance * invariance + 2 * (c.variance * variance + c.covariance * covariance)
        parts = {"loss/invariance": invariance, "loss/variance": variance, "loss/covariance": covariance}
        return Losses(total, {name: x.detach() for name, x in parts.items()})


def distance_between_views(z: Float[Tensor, "n k d"], present: Bool[Tensor, "n k"]) -> Float[Tensor, ""]:
    """The mean of |z_i^u - z_i^v|^2 over rows i and pairs u, v that they have: |x^u - x^v|^2 / d of x = sqrt(d) z."""
    count = present.sum(dim=1)
    held = z.masked_fill(~present[:, :, None], 0)
    mean = held.sum(dim=1) / count.clamp_min(1)[:, None]
    to_mean = (held - mean[:, None]).square().sum(dim=2).masked_fill(~present, 0).sum(dim=1)
    pairs = (count * (count - 1)).sum() / 2
    return (count * to_mean).sum() / pairs.clamp_min(1)


def variance_and_covariance(x: Float[Tensor, "m d"], deviation: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The variance and the covariance term of one view."""
    rows, d = x.shape
    if rows < 2:
        return x.new_zeros(()), x.new_zeros(())
    centred = x - x.mean(dim=0)
    covariance = centred.T @ centred / (rows - 1)
    variances = covariance.diagonal()
    short = (deviation - (variances + FLAT).sqrt()).clamp_min(0)
    return short.mean(), (covariance.square().sum() - variances.square().sum()) / d

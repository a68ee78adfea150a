"""Alignment and uniformity: the views of a sample close, the samples of a view spread over the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.similarity import autograd
from mvpretrain.similarity.groups import count_by_key
from mvpretrain.types import Embeddings, Losses

NEAREST = 1e-12  # squared distances below this have no gradient: with alpha < 2 it has no bound at 0


class AlignmentUniformityConfig(ObjectiveConfig):
    """`alpha` is the exponent of distances between views, `t` the width of the kernel between samples (1 / (2 s^2))."""

    kind: Literal["alignment_uniformity"] = "alignment_uniformity"
    alpha: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    t: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    alignment: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    uniformity: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"alpha": 1.0, "t": 3.0, "alignment": 0.5, "uniformity": 2.0}]

    def build(self, views: Sequence[str], collectives: Collectives) -> AlignmentUniformity:
        return AlignmentUniformity(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        pairs = views * (views - 1) // 2
        return super().memory(views, rows, gathered, dim) + (3 * pairs * rows + views * gathered) * dim * 4


class AlignmentUniformity(nn.Module):
    """The two losses of Wang and Isola 2020 (ICML), for k views, exact on the gathered batch:

        L = mean_(pairs u, v) E_i |z_i^u - z_i^v|^alpha  +  mean_u log E_(i, j) exp(-t |z_i^u - z_j^u|^2)

    alpha = 2, t = 2. The first expectation is over the rows that have both views, the second over the ordered pairs of
    rows of different ids that have the view; without any, a term is 0. Rows have length one, so that
    -t |x - y|^2 = 2 t <x, y> - 2 t, and the second is a log-sum-exp of similarities, tile by tile.

    The logarithm is of the whole batch's mean: each rank sums for its own rows, and k numbers a row are gathered. Cost
    for b of n rows: k b n d multiplications; memory O(k n d) and one tile.
    """

    def __init__(self, config: AlignmentUniformityConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, list(views), collectives

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        pairs = list(combinations(self.views, 2))
        alignment = torch.stack([self.distance(local, gathered, u, v) for u, v in pairs]).mean()
        uniformities = self.uniformities(local, gathered)
        uniformity = uniformities.mean()
        parts = {"loss/alignment": alignment.detach(), "loss/uniformity": uniformity.detach()}
        return Losses(self.config.alignment * alignment + self.config.uniformity * uniformity, parts)

    def distance(self, local: Embeddings, gathered: Embeddings, u: str, v: str) -> Float[Tensor, ""]:
        """E_i |z_i^u - z_i^v|^alpha over the rows of every rank, as a sum over this rank's (`BatchMean`)."""
        both = local.present[u] & local.present[v]
        squares = (at_least_float32(local.z[u][both]) - at_least_float32(local.z[v][both])).square().sum(dim=1)
        powers = squares if self.config.alpha == 2 else squares.clamp_min(NEAREST) ** (self.config.alpha / 2)
        count = (gathered.present[u] & gathered.present[v]).sum()
        return BatchMean.over(count, local, gathered)(powers)

    def uniformities(self, local: Embeddings, gathered: Embeddings) -> Float[Tensor, " k"]:
        """log E_(i, j) exp(-t |z_i - z_j|^2) of each view, over the whole batch."""
        sums = []
        for v in self.views:
            rows, columns = at_least_float32(local.z[v]), at_least_float32(gathered.z[v])
            scale = rows.new_full((1,), 2 * self.config.t)
            lse, _ = autograd.logsumexp(
                rows, columns, scale, gathered.present[v], exclude_same_id=(local.ids, gathered.ids)
            )
            sums.append(lse.masked_fill(~local.present[v], -torch.inf))
        by_row = self.collectives.gather(torch.stack(sums, dim=1))
        found = []
        for v, column in zip(self.views, by_row.unbind(1)):
            counted = column[column > -torch.inf]
            same = count_by_key(gathered.ids, gathered.present[v], gathered.ids[gathered.present[v]]).sum()
            pairs = int(gathered.present[v].sum()) ** 2 - int(same)
            log_sum = counted.logsumexp(dim=0) if len(counted) else counted.sum()
            found.append(log_sum - 2 * self.config.t - math.log(pairs) if pairs else counted.sum())
        return torch.stack(found)


def at_least_float32(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return z.to(torch.promote_types(z.dtype, torch.float32))

"""Barlow Twins between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._correlations import correlations
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.types import Embeddings, Losses


class BarlowConfig(ObjectiveConfig):
    """`off_diagonal` weighs the squared correlations of different dimensions (lambda)."""

    kind: Literal["barlow"] = "barlow"
    off_diagonal: float = Field(default=0.0051, ge=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"off_diagonal": 0.1}]

    def build(self, views: Sequence[str], collectives: Collectives) -> Barlow:
        return Barlow(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        pairs = views * (views - 1) // 2
        return super().memory(views, rows, gathered, dim) + pairs * (6 * gathered * dim * 4 + 2 * dim**2 * 4)


class Barlow(nn.Module):
    """Mean over pairs {u, v} of the loss of Zbontar et al. 2021 (Barlow Twins), exact on the gathered batch:

        L_uv = sum_l (1 - C_ll)^2 + lambda sum_l sum_(m != l) C_lm^2,    lambda = 0.0051

    C is the d x d matrix of correlations between the dimensions of view u and those of view v, over the rows that have
    both. It is defined on rows of any length; ours have length one and are read as x = sqrt(d) z, so that the 1e-5 that
    is added to variances, as in batch normalisation, is as small beside them as in the authors' code.

    Every rank computes the correlations of the whole batch from the gathered rows, so that the gradient is that of one
    process; the authors' code sums C over ranks outside of autograd, which divides its gradient by the number of ranks.
    A pair with fewer than two rows is 0. Rows of equal ids are rows as any other. Cost: n d^2 multiplications a pair;
    memory O(k^2 (n d + d^2)).
    """

    def __init__(self, config: BarlowConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.pairs = config, list(combinations(views, 2))

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        parts: dict[str, Tensor] = {}
        values = []
        for u, v in self.pairs:
            both = gathered.present[u] & gathered.present[v]
            correlation = correlations(gathered.z[u][both], gathered.z[v][both])
            own = correlation.diagonal()
            others = correlation.square().sum() - own.square().sum()
            counts = both.sum() > 1
            values.append(((1 - own).square().sum() + self.config.off_diagonal * others) * counts)
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            parts[f"correlation/{u}-{v}"] = own.mean().detach()
        return Losses(torch.stack(values).mean(), parts)

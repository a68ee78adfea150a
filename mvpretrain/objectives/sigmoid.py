"""The sigmoid loss between pairs of k views."""

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
from mvpretrain.similarity.positives import positive_mean
from mvpretrain.types import Embeddings, Losses


class SigmoidConfig(ObjectiveConfig):
    """SigLIP's loss: whether two rows belong together is a question of its own for every two rows of two views.

    `scale` and `bias` are where the learnable inverse temperature and offset start; `per_pair` learns them for each
    pair of views.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    scale: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=-10.0, allow_inf_nan=False)
    learnable: bool = True
    per_pair: bool = False

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"per_pair": True, "scale": 4.0, "bias": -2.0}]

    def build(self, views: Sequence[str], collectives: Collectives) -> Sigmoid:
        return Sigmoid(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # Local rows: the means of positives, and the gradients of both; candidates: one view's gradient, twice.
        return super().memory(views, rows, gathered, dim) + (3 * views * rows + 2 * gathered) * dim * 4


class Sigmoid(nn.Module):
    """Mean over pairs {u, v} of the sigmoid loss of Zhai et al. 2023 (SigLIP, section 3.2), on the gathered batch:

        L_uv = -(1/B) sum_i sum_j log sigmoid(y_ij (t <z_i^u, z_j^v> + c)),   y_ij = 1 where ids are equal, else -1

    over the rows i that have u and the rows j that have v. B is the mean number of rows of the two views: n where none
    is missing, as in the paper (1/B, not 1/B^2). t = exp(log_scale) starts at 10, the bias c at -10.

    Computed as softplus over all pairs of rows, less t s + c over the positives: positives are few and need no tile.
    Cost for b of n rows: b n d multiplications a pair; memory O(k n d) and one tile. A pair without rows is 0. State:
    log_scale and bias, shape [1] or [pairs].
    """

    def __init__(self, config: SigmoidConfig, views: Sequence[str]):
        super().__init__()
        self.pairs, self.per_pair = list(combinations(views, 2)), config.per_pair
        length = len(self.pairs) if config.per_pair else 1
        self.log_scale = nn.Parameter(torch.full((length,), math.log(config.scale)), requires_grad=config.learnable)
        self.bias = nn.Parameter(torch.full((length,), config.bias), requires_grad=config.learnable)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        scale, bias = self.log_scale.exp(), self.bias
        scales, biases = scale.expand(len(self.pairs)).split(1), bias.expand(len(self.pairs)).split(1)
        positives = {v: positive_mean(local, gathered, v) for v in dict.fromkeys(v for _, v in self.pairs)}
        parts: dict[str, Tensor] = {}
        values = []
        for (u, v), t, c in zip(self.pairs, scales, biases):
            values.append(pair_loss(local, gathered, u, v, positives[v], t, c))
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            if self.per_pair:
                parts |= {f"scale/{u}-{v}": t[0].detach(), f"bias/{u}-{v}": c[0].detach()}
        if not self.per_pair:
            parts |= {"scale": scale[0].detach(), "bias": bias[0].detach()}
        return Losses(torch.stack(values).mean(), parts)


def pair_loss(
    local: Embeddings,
    gathered: Embeddings,
    u: str,
    v: str,
    positive: Float[Tensor, "b d"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
) -> Float[Tensor, ""]:
    """This rank's rows of u against all rows of v; `positive` is the mean of those of v that carry the row's id."""
    as_negatives = autograd.softplus_sum(local.z[u], gathered.z[v], scale, bias, gathered.present[v])
    # log sigmoid(x) = x - softplus(x), and log sigmoid(-x) = -softplus(x).
    logits = scale * (local.z[u] * positive).sum(dim=1) + bias
    losses = as_negatives - count_by_key(gathered.ids, gathered.present[v], local.ids) * logits
    # B is half the sum of both views' rows.
    rows = gathered.present[u].sum() + gathered.present[v].sum()
    return 2 * BatchMean.over(rows, local, gathered)(losses, local.present[u])

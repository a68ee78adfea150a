"""SogCLR: contrastive learning against the whole data set, at one fixed temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._moving_average import Gamma, MovingAverages, robust_loss
from mvpretrain.objectives._settings import MovingAverageConfig
from mvpretrain.types import Embeddings, Losses


class SogCLRConfig(MovingAverageConfig):
    """The global contrastive loss at a fixed temperature.

    `published: true` averages, with `in_view`, the sum of a sample's two anchors instead of their mean.
    """

    kind: Literal["sogclr"] = "sogclr"
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    gamma: Gamma = Gamma(value=0.9)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"in_view": True},
            {"gradient": "features", "eps": 0.1},
            {"in_view": True, "published": True},
        ]

    def build(self, views: Sequence[str], collectives: Collectives) -> SogCLR:
        return SogCLR(self, views, collectives)


class SogCLR(nn.Module):
    """The global contrastive loss of Yuan et al. 2022 (SogCLR), the mean over pairs of k views, on the gathered batch:

        F = (tau / |S|) sum_i [ log(eps + g_i) + log(eps + g'_i) ],    g_i = mean_(j != i) e^((s_ij - s_ii) / tau)

    g over the whole data set S, estimated for each sample and direction by u <- (1 - gamma) u + gamma g of the batch.
    The value is F with u for g; the gradient weighs each anchor's log g of the batch by g / (eps + u). With gamma = 1
    both are those of the batch alone. Rows of equal ids are positives (their mean similarity) and have one average.

    Cost for b of n rows and a pair: 10 b n d multiplications; memory O(k n d) and one tile. State: see MovingAverages,
    one number an id and direction.
    """

    def __init__(self, config: SogCLRConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config = config
        self.averages = MovingAverages(config.settings(views), collectives)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        (old,) = self.averages.read(local, gathered)
        tau = old.new_full((len(local.ids),), self.config.temperature)
        doubled = math.log(2) if self.config.published and self.config.in_view else 0.0
        return self.averages.losses(
            local,
            gathered,
            old,
            [tau] * len(self.averages.directions),
            lambda anchors, t: robust_loss(anchors, t, 0.0),
            adjust=lambda log_g: log_g + doubled,
        )

"""Decoupled contrastive learning between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement, permutations
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.similarity.all_pairs import all_pairs
from mvpretrain.similarity.log_sum_exp import LOG_ZERO, add_log_sums
from mvpretrain.similarity.positives import has_positive, positive_mean
from mvpretrain.similarity.tables import AnchorSums, Direction
from mvpretrain.types import AnchorWeighting, Embeddings, Losses


class DCLConfig(ObjectiveConfig):
    """InfoNCE without the positive in its denominator.

    `weighted: sigma` weights positives as DCLW does (the paper's sigma is 0.5). The temperature is fixed: without the
    positive below, the loss falls without end as it goes to 0.
    """

    kind: Literal["dcl"] = "dcl"
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    weighted: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"weighted": 0.5, "temperature": 0.2}]

    def differentiable(self) -> bool:
        return self.weighted is None  # the weights are constants

    def build(self, views: Sequence[str], collectives: Collectives) -> DCL:
        return DCL(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # All views: a second gradient while it is added to the first; local rows: the means of positives besides; and
        # the products of one pair.
        return (
            super().memory(views, rows, gathered, dim)
            + (views * (gathered + 3 * rows) + 2 * (gathered + rows)) * dim * 4
        )


class DCL(nn.Module):
    """Mean over pairs {u, v} and both directions of the decoupled loss of Yeh et al. 2022, on the gathered batch:

        l_i = -w_i <z_i^u, z_i^v> / tau + log sum_{j != i} [ e^(<z_i^u, z_j^u> / tau) + e^(<z_i^u, z_j^v> / tau) ]

    with w_i = 1 (DCL), or the negative von Mises-Fisher weight, whose mean over the anchors is 1 (DCLW):

        w_i = 2 - e^(<z_i^u, z_i^v> / sigma) / mean_m e^(<z_m^u, z_m^v> / sigma)

    The weights are constants to the gradient: through them it would push good positives apart. The paper adds the two
    directions, twice the value here. Rows of equal ids are positives (the mean of their similarities), never negatives.

    An anchor counts where it has a positive in v and where there is another sample in u or v. Cost for b of n rows:
    k (k + 1) / 2 b n d multiplications; memory O(k n d) and one tile. No state.
    """

    def __init__(self, config: DCLConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, list(views), collectives
        self.directions = list(permutations(views, 2))
        self.weighting: AnchorWeighting | None = None

    def weight_anchors(self, weighting: AnchorWeighting) -> None:
        self.weighting = weighting

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        z = local.z[self.views[0]]
        scale = z.new_full((1,), 1 / self.config.temperature, dtype=torch.promote_types(z.dtype, torch.float32))
        pairs = list(combinations_with_replacement(self.views, 2))
        sums = all_pairs(local, gathered, pairs, scale.expand(len(pairs)), self.collectives, exclude_same_id=True)
        means = {v: positive_mean(local, gathered, v) for v in self.views}
        parts: dict[str, Tensor] = {}
        for u, v in combinations(self.views, 2):
            one = self.direction_loss(local, gathered, u, v, means[v], sums)
            other = self.direction_loss(local, gathered, v, u, means[u], sums)
            parts[f"loss/{u}-{v}"] = (one + other) / 2
        total = torch.stack(list(parts.values())).mean()
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def direction_loss(
        self,
        local: Embeddings,
        gathered: Embeddings,
        u: str,
        v: str,
        positive: Float[Tensor, "b d"],
        sums: dict[Direction, AnchorSums],
    ) -> Float[Tensor, ""]:
        """Anchors of view u; `positive` is the mean of the rows of v that carry the anchor's id."""
        several = several_samples(gathered, u, v)
        valid = has_positive(local, gathered, u, v) & several
        all_valid = has_positive(gathered, gathered, u, v) & several
        scores = (local.z[u] * positive).sum(dim=1)
        negatives = add_log_sums([sums[u, u].lse, sums[u, v].lse])
        sigma = self.config.weighted
        weights = 1.0 if sigma is None else positive_weights(scores, gathered, u, v, all_valid, sigma)
        losses = negatives - weights * scores / self.config.temperature
        losses = losses if self.weighting is None else self.weighting((u, v), losses.masked_fill(~valid, 0), valid)
        return BatchMean.over(all_valid.sum(), local, gathered)(losses, valid)


def several_samples(gathered: Embeddings, u: str, v: str) -> Bool[Tensor, ""]:
    """Whether u and v hold more than one sample: with one there are no negatives, and no loss."""
    ids = gathered.ids[gathered.present[u] | gathered.present[v]]
    return (ids != ids[:1]).any()


@torch.no_grad()
def positive_weights(
    scores: Float[Tensor, " b"], gathered: Embeddings, u: str, v: str, all_valid: Bool[Tensor, " n"], sigma: float
) -> Float[Tensor, " b"]:
    """DCLW's weights w_i of the local anchors, from the similarities of the anchors of every rank."""
    all_scores = (gathered.z[u] * positive_mean(gathered, gathered, v)).sum(dim=1) / sigma
    log_sum = all_scores.masked_fill(~all_valid, LOG_ZERO).logsumexp(dim=0)
    # An anchor is part of the sum; the others' weights must only be finite.
    return 2 - (scores / sigma - log_sum).clamp_max(0).exp() * all_valid.sum()

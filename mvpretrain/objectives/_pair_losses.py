"""The softmax loss of a pair of views from the sums of its anchors, which others may weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mvpretrain.distributed.gather import BatchMean
from mvpretrain.similarity.tables import AnchorSums, Direction
from mvpretrain.types import AnchorWeighting, Embeddings


class PairLoss(NamedTuple):
    """The mean loss, and the part of the anchors whose most similar candidate is a positive."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def pair_loss(
    local: Embeddings,
    gathered: Embeddings,
    pair: tuple[str, str],
    sums: Mapping[Direction, AnchorSums],
    scale: Float[Tensor, ""],
    in_view: Mapping[str, Float[Tensor, " b"]],
    weighting: AnchorWeighting | None,
) -> PairLoss:
    """The mean of a pair's two directions; `in_view` are log-sum-exps by view that join their anchors' denominators."""
    u, v = pair
    one, other = (
        direction_loss(local, gathered, (a, c), sums[a, c], scale, in_view.get(a), weighting)
        for a, c in ((u, v), (v, u))
    )
    return PairLoss((one.loss + other.loss) / 2, (one.accuracy + other.accuracy) / 2)


def direction_loss(
    local: Embeddings,
    gathered: Embeddings,
    direction: Direction,
    sums: AnchorSums,
    scale: Float[Tensor, ""],
    others: Float[Tensor, " b"] | None,
    weighting: AnchorWeighting | None,
) -> PairLoss:
    """Anchors of one view against candidates of another: log(sum e^(scale s) + e^others) - scale positive, their mean.

    `weighting(direction, losses, anchors)` gives the losses that the mean is of. The mean is over the anchors of every
    rank; see `BatchMean`.
    """
    log_sum = sums.lse
    if others is not None:
        # Rows that are no anchors: where neither sum has a term, the gradient of logaddexp would be NaN.
        log_sum = torch.logaddexp(*(x.masked_fill(~sums.is_anchor, 0) for x in (sums.lse, others)))
    mean = BatchMean.over(sums.anchor_count, local, gathered)
    losses = (log_sum - scale * sums.positive).masked_fill(~sums.is_anchor, 0)
    losses = losses if weighting is None else weighting(direction, losses, sums.is_anchor)
    hits = (gathered.ids[sums.argmax] == local.ids) & sums.is_anchor
    return PairLoss(mean(losses, sums.is_anchor), mean(hits).detach())

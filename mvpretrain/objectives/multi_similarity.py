"""The multi-similarity loss between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean, own_rows
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._settings import pairs_of
from mvpretrain.similarity.autograd import Tensors, logsumexp_of_score
from mvpretrain.similarity.groups import classes
from mvpretrain.similarity.log_sum_exp import LOG_ZERO
from mvpretrain.types import Embeddings, Losses


class MultiSimilarityConfig(ObjectiveConfig):
    """Positives below a threshold are pulled and negatives above it pushed, each as much as others make it stand out.

    `alpha` and `beta` sharpen both sides, `threshold` is between them, and `margin` is that of the mining, null for
    none. `labels: true` takes rows of one class (`data.label`) for positives; without it, and without a label, those of
    one id. `pairs` as infonce has them.
    """

    kind: Literal["multi_similarity"] = "multi_similarity"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    alpha: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    beta: float = Field(default=40.0, gt=0, allow_inf_nan=False)
    threshold: float = Field(default=0.5, allow_inf_nan=False)
    margin: float | None = Field(default=0.1, ge=0, allow_inf_nan=False)
    labels: bool = False

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"labels": True, "margin": None}, {"pairs": "view0", "margin": 0.5, "beta": 10.0}]

    def check(self, views: Sequence[str]) -> None:
        pairs_of(self.pairs, views)

    def build(self, views: Sequence[str], collectives: Collectives) -> MultiSimilarity:
        return MultiSimilarity(self, views, collectives)


class MultiSimilarity(nn.Module):
    """Mean over pairs {u, v}, both directions and the rows of u of the loss of Wang et al. 2019 (eq. 12):

        l_i = (1 / alpha) log[ 1 + sum_(p in P_i) e^(-alpha (s_ip - t)) ]
            + (1 / beta) log[ 1 + sum_(n in N_i) e^(beta (s_in - t)) ]

    Mining (eq. 10, 11) keeps negatives with s_in + margin > min_p s_ip and positives with s_ip - margin < max_n s_in. A
    row without a partner on one side keeps all of the other. The mean is over all rows that have u, those that mining
    leaves without a pair included, as in the authors' code.

    Cost for b of n rows and a pair: 4 b n d multiplications forward (half without mining) and 8 b n d backward, each
    tile by autograd; memory O(k n d) and some tiles. No state.
    """

    def __init__(self, config: MultiSimilarityConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.collectives, self.pairs = config, collectives, pairs_of(config.pairs, views)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        classes_of_all = classes(gathered.ids, gathered.labels) if self.config.labels else gathered.ids
        own = classes_of_all[own_rows(local, self.collectives)]
        parts: dict[str, Tensor] = {}
        for u, v in self.pairs:
            one = self.direction_loss(local, gathered, u, v, own, classes_of_all)
            other = self.direction_loss(local, gathered, v, u, own, classes_of_all)
            parts[f"loss/{u}-{v}"] = (one + other) / 2
        total = torch.stack(list(parts.values())).mean()
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def direction_loss(
        self,
        local: Embeddings,
        gathered: Embeddings,
        u: str,
        v: str,
        row_classes: Int[Tensor, " b"],
        column_classes: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Anchors of view u against candidates of view v, each with its class."""
        c, valid = self.config, gathered.present[v]
        kind = torch.promote_types(local.z[u].dtype, torch.float32)
        rows, columns = local.z[u].to(kind), gathered.z[v].to(kind)
        least, most = self.mined(rows, columns, row_classes, column_classes, valid)

        def positive(anchors: Tensors, candidates: Tensors, _: Tensors) -> Tensor:
            s, same = similarities(anchors, candidates)
            return torch.where(same & (s < anchors[2][:, None]), -c.alpha * (s - c.threshold), LOG_ZERO)

        def negative(anchors: Tensors, candidates: Tensors, _: Tensors) -> Tensor:
            s, same = similarities(anchors, candidates)
            return torch.where(~same & (s > anchors[2][:, None]), c.beta * (s - c.threshold), LOG_ZERO)

        pulled, _ = logsumexp_of_score(positive, (rows, row_classes, most), (columns, column_classes), (), valid)
        pushed, _ = logsumexp_of_score(negative, (rows, row_classes, least), (columns, column_classes), (), valid)
        losses = softplus(pulled.clamp_min(LOG_ZERO)) / c.alpha + softplus(pushed.clamp_min(LOG_ZERO)) / c.beta
        mean = BatchMean.over(gathered.present[u].sum(), local, gathered)
        return mean(losses, local.present[u])

    @torch.no_grad()
    def mined(
        self, rows: Tensor, columns: Tensor, row_classes: Tensor, column_classes: Tensor, valid: Tensor
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """What a negative's similarity must be above, and a positive's below: infinite where there is no partner."""
        if self.config.margin is None:
            return rows.new_full((len(rows),), -torch.inf), rows.new_full((len(rows),), torch.inf)

        def farthest(anchors: Tensors, candidates: Tensors, _: Tensors) -> Tensor:
            s, same = similarities(anchors, candidates)
            return torch.where(same, -s, LOG_ZERO)

        def nearest(anchors: Tensors, candidates: Tensors, _: Tensors) -> Tensor:
            s, same = similarities(anchors, candidates)
            return torch.where(~same, s, LOG_ZERO)

        found = []
        for score, of_positives in ((farthest, True), (nearest, False)):
            _, argmax = logsumexp_of_score(score, (rows, row_classes), (columns, column_classes), (), valid)
            any_partner = valid[argmax] & ((column_classes[argmax] == row_classes) == of_positives)
            found.append(((rows * columns[argmax]).sum(dim=1), any_partner))
        (least, any_positive), (most, any_negative) = found
        margin = self.config.margin
        return (
            torch.where(any_positive, least - margin, -torch.inf),
            torch.where(any_negative, most + margin, torch.inf),
        )


def similarities(anchors: Tensors, candidates: Tensors) -> tuple[Float[Tensor, "i j"], Bool[Tensor, "i j"]]:
    """(similarities, whether classes are equal) of one tile; both come as (rows, classes, ...)."""
    return anchors[0] @ candidates[0].T, anchors[1][:, None] == candidates[1]

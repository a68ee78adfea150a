"""Poly-view contrastive losses: every view of a sample against all views of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._settings import Temperature
from mvpretrain.similarity import autograd
from mvpretrain.similarity.all_pairs import all_pairs
from mvpretrain.similarity.groups import mean_of_others
from mvpretrain.similarity.log_sum_exp import LOG_ZERO, add_log_sums
from mvpretrain.similarity.positives import has_positive, positive_mean
from mvpretrain.types import Embeddings, Losses


class PolyviewConfig(ObjectiveConfig):
    """Each view of a sample is contrasted with all views of the other samples, once with each of its other views.

    `form`: `geometric` averages the positives' log probabilities, `arithmetic` their probabilities; `sufficient` has
    one positive, the average of the other views, and such averages as negatives.
    """

    kind: Literal["polyview"] = "polyview"
    form: Literal["geometric", "arithmetic", "sufficient"] = "geometric"
    temperature: Temperature = Temperature()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, *({"form": form, "temperature": {"init": 0.2}} for form in ("arithmetic", "sufficient"))]

    def check(self, views: Sequence[str]) -> None:
        self.temperature.refuse_per_pair("polyview has one denominator over all views and so one temperature")

    def build(self, views: Sequence[str], collectives: Collectives) -> Polyview:
        return Polyview(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # All views: a second gradient while it is added to the first, or the averages and their gradient; local rows:
        # the means of positives besides; and the products of one pair.
        tables = 2 * gathered + rows if self.form == "sufficient" else gathered + 3 * rows
        return super().memory(views, rows, gathered, dim) + (views * tables + 2 * (gathered + rows)) * dim * 4


class Polyview(nn.Module):
    """Mean over anchors of the poly-view losses of Shidani et al. 2024 (ICLR), on the gathered batch.

    An anchor is a row i's view a. With s(x, y) = <x, y> / tau and the negatives of all k views of all other samples,

        p_ab = e^s(z_i^a, z_i^b) / (e^s(z_i^a, z_i^b) + sum_{j != i} sum_c e^s(z_i^a, z_j^c))

        geometric:  -(1 / (k - 1)) sum_{b != a} log p_ab
        arithmetic: -log [ (1 / (k - 1)) sum_{b != a} p_ab ]
        sufficient: -log p_a, where the mean of the views b != a of row i stands for z_i^b, and the mean of the views
                    other than c of row j for z_j^c

    A denominator holds one positive: the others of the sample are left out of it. With views missing, k - 1 is the
    number of other views that the sample has, and an anchor without any counts nowhere. Rows of equal ids are one
    sample: the mean of its rows' views b stands for z_i^b, and none of them is a negative.

    Cost for b of n rows: k (k + 1) / 2 b n d multiplications (sufficient: k^2); memory O(k n d) and one tile. State:
    log tau, shape [1].
    """

    def __init__(self, config: PolyviewConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, list(views), collectives
        self.log_temperature = config.temperature.parameter()

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        scale = 1 / temperature
        sufficient = self.config.form == "sufficient"
        candidates = of_other_views(gathered, self.views) if sufficient else gathered
        negatives = average_negatives if sufficient else view_negatives
        negative_sums = negatives(local, candidates, self.views, scale, self.collectives)
        means = {v: positive_mean(local, candidates, v) for v in self.views}
        parts: dict[str, Tensor] = {}
        sums, counts = [], []
        for a in self.views:
            others = [a] if sufficient else [b for b in self.views if b != a]
            scores = torch.stack([scale * (local.z[a] * means[b]).sum(dim=1) for b in others])
            valid = torch.stack([has_positive(local, candidates, a, b) for b in others])
            losses = average(logsigmoid(scores - negative_sums[a]), valid, self.config.form)
            all_valid = torch.stack([has_positive(gathered, candidates, a, b) for b in others]).any(dim=0)
            sums.append(losses.masked_fill(~valid.any(dim=0), 0).sum())
            counts.append(all_valid.sum())
            parts[f"loss/{a}"] = BatchMean.over(counts[-1], local, gathered)(sums[-1].detach())
        parts["temperature"] = temperature[0].detach()
        total = torch.stack(sums)
        return Losses(BatchMean.over(torch.stack(counts), local, gathered)(total), parts)


def average(
    log_p: Float[Tensor, "p b"], valid: Bool[Tensor, "p b"], form: Literal["geometric", "arithmetic", "sufficient"]
) -> Float[Tensor, " b"]:
    """Minus the log of the geometric or arithmetic mean over the valid positives (0 where none is)."""
    count = valid.sum(dim=0).clamp_min(1).to(log_p.dtype)
    if form == "arithmetic":
        return count.log() - log_p.masked_fill(~valid, LOG_ZERO).logsumexp(dim=0)
    return -log_p.masked_fill(~valid, 0).sum(dim=0) / count


def of_other_views(table: Embeddings, views: Sequence[str]) -> Embeddings:
    """The table with, in place of each view, the mean of the row's other views."""
    means, present = mean_of_others({v: table.z[v] for v in views}, {v: table.present[v] for v in views})
    return table._replace(z=means, present=present)


def view_negatives(
    local: Embeddings, gathered: Embeddings, views: Sequence[str], scale: Float[Tensor, "1"], collectives: Collectives
) -> dict[str, Float[Tensor, " b"]]:
    """For each anchor view, log-sum-exp over all views of the other samples."""
    pairs = list(combinations_with_replacement(views, 2))
    sums = all_pairs(local, gathered, pairs, scale.expand(len(pairs)), collectives, exclude_same_id=True)
    return {a: add_log_sums([sums[a, v].lse for v in views]) for a in views}


def average_negatives(
    local: Embeddings, candidates: Embeddings, views: Sequence[str], scale: Float[Tensor, "1"], collectives: Collectives
) -> dict[str, Float[Tensor, " b"]]:
    """For each anchor view, log-sum-exp over all averages of the other samples."""
    ids = local.ids, candidates.ids
    sums = {
        (a, v): autograd.logsumexp(local.z[a], candidates.z[v], scale, candidates.present[v], exclude_same_id=ids)[0]
        for a in views
        for v in views
    }
    return {a: add_log_sums([sums[a, v] for v in views]) for a in views}

"""InfoNCE between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor, nn

from mvpretrain.config import Config, unknown
from mvpretrain.exchange import Exchange
from mvpretrain.numerics import tiles
from mvpretrain.numerics.bounded import bounded_exp
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.types import Embeddings, Losses


class Temperature(Config):
    """The softmax temperature; learnable ones are kept within [min, max]."""

    init: float = 0.07
    min: float = 0.01
    max: float = 1.0
    learnable: bool = True
    per_pair: bool = False

    @model_validator(mode="after")
    def _within(self) -> Temperature:
        if not 0 < self.min <= self.init <= self.max:
            raise ValueError(f"needs 0 < min <= init <= max, got min={self.min} init={self.init} max={self.max}")
        return self


class InfoNCEConfig(ObjectiveConfig):
    """Pairwise InfoNCE: `pairs` is `all`, a view name (that view against each other one), or a list of pairs.

    `weights` scales pairs by name ("image-text": 2.0; 1 where not named). `in_view: true` adds the other samples of
    the anchor's own view to its denominator: with two augmentations of one image this is SimCLR's NT-Xent.
    """

    kind: Literal["infonce"] = "infonce"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    weights: dict[str, float] = {}
    temperature: Temperature = Temperature()
    in_view: bool = False

    def listed(self, views: Sequence[str]) -> list[tuple[str, str]]:
        if self.pairs == "all":
            return list(combinations(views, 2))
        if isinstance(self.pairs, str):
            return [(self.pairs, v) for v in views if v != self.pairs]
        return list(self.pairs)

    def check(self, views: Sequence[str]) -> None:
        pairs = self.listed(views)
        for v in {v for pair in pairs for v in pair}:
            if v not in views:
                raise ValueError(unknown("view in objective.pairs", v, views))
        for u, v in pairs:
            if u == v:
                raise ValueError(f"objective.pairs names {u!r} against itself; a pair is two different views")
        names = [f"{u}-{v}" for u, v in pairs]
        for name, weight in self.weights.items():
            if name not in names:
                raise ValueError(unknown("pair in objective.weights", name, names))
            if weight < 0:
                raise ValueError(f"objective.weights.{name} is {weight}, weights are not negative")
        if sum(self.weights.get(n, 1.0) for n in names) <= 0:
            raise ValueError("objective.weights leaves no pair with a weight above 0")

    def build(self, views: Sequence[str], exchange: Exchange) -> InfoNCE:
        return InfoNCE(self, self.listed(views))


class InfoNCE(nn.Module):
    """Weighted mean over pairs {u, v} of the symmetric InfoNCE, exact on the gathered batch.

    For an anchor row i of view u, with P(i) the rows of v that carry i's id:

        l_i = log sum_{j in v} exp(s_ij / tau) - mean_{p in P(i)} s_ip / tau

    and the pair's value is the mean over the rows of u that have a positive in v, averaged with v against u. With one
    positive per row this is the softmax cross-entropy of van den Oord et al. 2018 (eq. 4) in both directions (CLIP);
    with several, the outside form of Khosla et al. 2020 (eq. 2). With `in_view`, log-sum-exp runs over the rows of u
    with another id as well (NT-Xent, Chen et al. 2020, eq. 1).

    Rows that are absent in u or v count neither as anchors nor as candidates; a pair without rows is 0. Cost for b of n
    rows: b n d multiplications a direction; memory O(n d) and one tile. State: log tau, shape [1] or [pairs].
    """

    def __init__(self, config: InfoNCEConfig, pairs: list[tuple[str, str]]):
        super().__init__()
        self.pairs, self.config = pairs, config
        weights = [config.weights.get(f"{u}-{v}", 1.0) for u, v in pairs]
        self.weights = [w / sum(weights) for w in weights]
        start = torch.full((len(pairs) if config.temperature.per_pair else 1,), config.temperature.init).log()
        self.log_temperature = nn.Parameter(start, requires_grad=config.temperature.learnable)

    def forward(self, local: Embeddings, every: Embeddings) -> Losses:
        t = self.config.temperature
        temperature = bounded_exp(self.log_temperature, t.min, t.max)
        per_pair = temperature.expand(len(self.pairs))
        parts: dict[str, Tensor] = {}
        values = []
        for index, (u, v) in enumerate(self.pairs):
            scale = 1 / per_pair[index : index + 1]
            there, hits_there = one_way(local, every, u, v, scale, self.config.in_view)
            back, hits_back = one_way(local, every, v, u, scale, self.config.in_view)
            values.append((there + back) / 2)
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            parts[f"accuracy/{u}-{v}"] = ((hits_there + hits_back) / 2).detach()
            if t.per_pair:
                parts[f"temperature/{u}-{v}"] = per_pair[index].detach()
        if not t.per_pair:
            parts["temperature"] = temperature[0].detach()
        total = sum(w * value for w, value in zip(self.weights, values))
        assert isinstance(total, Tensor)
        return Losses(total, parts)


def one_way(
    local: Embeddings, every: Embeddings, u: str, v: str, scale: Float[Tensor, "1"], in_view: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Anchors of view u against candidates of view v: (loss, share of anchors whose best candidate is a positive)."""
    anchors, candidates = local.z[u], every.z[v]
    log_sum, best = tiles.logsumexp(anchors, candidates, scale, every.present[v])
    if in_view:
        others, _ = tiles.logsumexp(anchors, every.z[u], scale, every.present[u], apart=(local.ids, every.ids))
        log_sum = torch.logaddexp(log_sum, others)
    positives = scale * (anchors * positive_mean(local, every, v)).sum(dim=1)
    counts, all_counts = has_positive(local, every, u, v), has_positive(every, every, u, v)
    # The global number of anchors, as seen from one of len(every) / len(local) equal parts.
    rows = all_counts.sum().clamp_min(1).to(log_sum.dtype) * (len(local.ids) / len(every.ids))
    loss = (log_sum - positives).masked_fill(~counts, 0).sum() / rows
    hits = ((every.ids[best] == local.ids) & counts).sum() / rows
    return loss, hits


def positive_mean(local: Embeddings, every: Embeddings, v: str) -> Float[Tensor, "b d"]:
    """For each local row, the mean of view v over the present rows of every rank that carry its id (0 where none)."""
    unique, group = every.ids.unique(return_inverse=True)
    present = every.present[v].to(every.z[v].dtype)
    sums = every.z[v].new_zeros(len(unique), every.z[v].shape[1])
    sums = sums.index_add(0, group, every.z[v] * present[:, None])
    count = present.new_zeros(len(unique)).index_add(0, group, present)
    mine = torch.searchsorted(unique, local.ids)
    return sums[mine] / count[mine].clamp_min(1)[:, None]


def has_positive(table: Embeddings, every: Embeddings, u: str, v: str) -> Bool[Tensor, " b"]:
    """True for rows of `table` that have view u and, somewhere, a row of the same id that has view v."""
    return table.present[u] & torch.isin(table.ids, every.ids[every.present[v]])

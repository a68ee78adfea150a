"""ALDR: label-distributionally robust contrastive learning, with individual temperatures in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean, own_rows
from mvpretrain.distributed.sample_state import SampleState
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._moving_average import temperature_parts
from mvpretrain.objectives._settings import pair_count, pairs_of
from mvpretrain.similarity.groups import Groups, group_mean
from mvpretrain.similarity.per_anchor import GradientMode, PerAnchorSums, per_anchor
from mvpretrain.similarity.tables import directions_of
from mvpretrain.types import Embeddings, Losses


class ALDRConfig(ObjectiveConfig):
    """A robust softmax loss whose temperature falls where an anchor's candidates are clearly distinguished.

    `temperature` is the largest (lambda_0) and `alpha` says how far below it one can be: down to (1 - 1 / alpha) of it.
    The paper's lambda_0 of 1 is for the logits of a classifier; cosines want a smaller one. `margin` is added to
    negatives.
    """

    kind: Literal["aldr"] = "aldr"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    alpha: float = Field(default=2.0, gt=1, allow_inf_nan=False)
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gradient: GradientMode = "scalars"
    device: bool = False

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"gradient": "features", "margin": 0.1}]

    def differentiable(self) -> bool:
        return False  # temperatures are constants

    def check(self, views: Sequence[str]) -> None:
        pairs_of(self.pairs, views)

    def build(self, views: Sequence[str], collectives: Collectives) -> ALDR:
        return ALDR(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        directions = 2 * pair_count(self.pairs, views)
        return super().memory(views, rows, gathered, dim) + ((directions + 2 * views) * rows + 2 * gathered) * dim * 4


class ALDR(nn.Module):
    """The mean over pairs, and their two directions, of ALDR-KL (Zhu et al. 2023) on the gathered batch:

        l_i = lambda_i log[ (1/K) (1 + sum_(j != i) e^((c + s_ij - s_ii) / lambda_i)) ]
              - alpha log K / (2 lambda_0) (lambda_i - lambda_0)^2

    over an anchor's K candidates, its positive among them. With p the softmax of s_i / lambda_i over them,

        lambda_i = lambda_0 - lambda_0 KL(p, uniform) / (alpha log K)

    is a constant to the gradient, found by one step of this fixed-point iteration a visit from where the sample's last
    visit left it (lambda_0 at first); in between it is kept by id. There is no rate to choose. Logits are cosines here
    and are not normalised by their mean size as in the authors' code. Rows of equal ids are positives (their mean
    similarity) and have one lambda, the mean of theirs.

    Cost for b of n rows and a pair: 16 b n d multiplications; memory O(k n d) and one tile. State: one number an id and
    direction.
    """

    def __init__(self, config: ALDRConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.collectives = config, collectives
        self.pairs = pairs_of(config.pairs, views)
        self.directions = directions_of(self.pairs)
        self.store = SampleState(len(self.directions), collectives, config.device)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        like = next(iter(local.z.values())).detach()
        old = self.store.read(gathered.ids, like.to(torch.promote_types(like.dtype, torch.float32)))
        old = old.nan_to_num(nan=self.config.temperature)
        own = own_rows(local, self.collectives)
        new, valid = self.sharpened(local, gathered, old, own)
        temperatures = new[own].T.contiguous()
        found = per_anchor(
            local, gathered, self.directions, 1 / temperatures, self.collectives, True, self.config.gradient
        )
        values, hits = [], []
        for w, f in enumerate(found):
            anchors = valid[own, w]
            mean = BatchMean.over(valid[:, w].sum(), local, gathered)
            values.append(mean(self.losses(f, temperatures[w], anchors), anchors))
            hits.append(mean((f.positive > f.top) & anchors))
        if self.training:
            self.store.write(gathered.ids[valid.any(dim=1)], new[valid.any(dim=1)])
        parts = {}
        for p, (u, v) in enumerate(self.pairs):
            parts[f"loss/{u}-{v}"] = ((values[2 * p] + values[2 * p + 1]) / 2).detach()
            parts[f"accuracy/{u}-{v}"] = (hits[2 * p] + hits[2 * p + 1]) / 2
        low = self.config.temperature * (1 - 1 / self.config.alpha)
        parts |= temperature_parts(new, valid, low, self.config.temperature)
        return Losses(torch.stack(values).mean(), parts)

    @torch.no_grad()
    def sharpened(
        self, local: Embeddings, gathered: Embeddings, old: Float[Tensor, "n w"], own: slice
    ) -> tuple[Float[Tensor, "n w"], Bool[Tensor, "n w"]]:
        """(the gathered rows' temperatures after this batch, which of them are anchors of which direction)."""
        before = old[own].T.contiguous()
        found = per_anchor(local, gathered, self.directions, 1 / before, self.collectives, True, self.config.gradient)
        c, columns = self.config, []
        for f, temperature in zip(found, before, strict=True):
            valid = f.is_anchor & (f.candidates > 0)
            log_k = (f.candidates + 1).to(temperature).log()
            positive = f.positive / temperature
            log_sum = torch.logaddexp(f.lse - positive, torch.zeros_like(positive))  # less the positive's own logit
            mean = (1 - (-log_sum).exp()) * (f.mean - positive)
            divergence = (log_k + mean - log_sum).clamp_min(0)
            columns.append(torch.stack([c.temperature * (1 - divergence / (c.alpha * log_k)), valid.to(mean)]))
        packed = torch.stack(columns).permute(2, 1, 0).contiguous()
        temperatures, all_valid = self.collectives.gather(packed).unbind(1)
        groups, valid = Groups.by(gathered.ids), all_valid > 0.5
        merged = [group_mean(groups, temperatures[:, w, None], valid[:, w, None]) for w in range(len(self.directions))]
        new = torch.stack(merged, dim=1)
        return torch.where(new.isnan(), old, new), valid

    def losses(self, found: PerAnchorSums, temperature: Tensor, valid: Tensor) -> Float[Tensor, " b"]:
        """l_i of each anchor; any number for the others."""
        c, log_k = self.config, (found.candidates + 1).to(temperature).log()
        negatives = (found.lse + (c.margin - found.positive) / temperature).masked_fill(~valid, 0)
        log_sum = torch.logaddexp(negatives, torch.zeros_like(negatives))
        penalty = c.alpha * log_k / (2 * c.temperature) * (temperature - c.temperature).square()
        return temperature * (log_sum - log_k) - penalty

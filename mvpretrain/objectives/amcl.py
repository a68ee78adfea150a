"""Adaptive multi-head contrastive learning between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean, own_rows
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._amcl_barlow import BarlowAMCL
from mvpretrain.objectives._amcl_candidates import (
    HeadRows,
    hardest,
    has_negative,
    positive_of,
    published_losses,
    soft_losses,
    top_losses,
)
from mvpretrain.objectives._amcl_usage import usage
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._settings import agreed_dim, pair_count, pairs_of
from mvpretrain.objectives._temperature_network import NearIdentity, NormedPredictor, TemperatureNetwork
from mvpretrain.similarity.blockwise import COLUMNS, ROWS
from mvpretrain.similarity.positives import has_positive
from mvpretrain.types import Embeddings, Losses

# What the authors run, where a recipe does not say otherwise.
PUBLISHED = {"kappa": 100, "beta": 1e-4, "eta_low": 1e-5, "eta_up": 2.0, "width": 128, "detach": False}
PUBLISHED_BASES = {
    "simclr": {"aggregate": "top", "in_view": True},
    "moco": {"aggregate": "top"},
    "simsiam": {},
    "barlow": {"beta": 1e-6},
}
SIX_TILES = 6 * ROWS * COLUMNS  # numbers that a softly summed tile holds


class AMCLConfig(ObjectiveConfig):
    """Several heads a tower, and a learned temperature for every pair of rows and head.

    `heads`: projections of one make, each of them as wide as the recipe's `dim`. `base`: the loss that is extended;
    `infonce` has the positive among the candidates and `simclr` has not, `simsiam` and `barlow` have no negatives.
    `aggregate`: candidates count `soft`, all by a log-sum-exp, or the `top` kappa (16), the most similar, by their
    mean. `pairs` and `in_view` are as in infonce. `beta`: the weight of the temperatures' own term; 1 is a Gaussian
    likelihood. Temperatures lie in [`eta_low`, `eta_up`] (by default [0.5, 1.5] for `barlow`), fixed where these are
    equal. `width`: of the hidden layers of the temperature network and of SimSiam's predictors. `detach`: rows go into
    the temperature network without gradient. `off_diagonal`: Barlow's lambda.

    `published`: the authors' code, version 2.0, with its values where none are given (kappa 100, beta 1e-4 or Barlow's
    1e-6, temperatures in [1e-5, 2], width 128, no detach). Its bases are `simclr` (the default; negatives of both
    views), `moco` (the first view of a pair against the second one, whose rows without the first, a teacher's queue,
    are the negatives: `pairs: [[a, b@teacher], [b, a@teacher]]`), `simsiam` and `barlow`, which needs `batch`, the rows
    of a gathered batch. `dim` is derived from the recipe's.

    What the temperatures learn: mismatched pairs get higher ones than true pairs. With a tenth of 160 pairs mismatched
    and linear towers, after 120 steps a mismatched pair was above a true one in 86 to 98 of 100 comparisons by default
    (after 250, when the towers knew mismatches by heart, in 75 to 84), in 89 to 100 with beta 1, in 75 to 100 with
    `base: simclr`, and in none with the authors' values, where all temperatures run to their lower bound (three seeds;
    tests/objectives/test_amcl.py). In 200 steps on real data they went from 0.1 to 0.097, and stayed all but equal. The
    default beta and bounds are ours, by short runs on small data.
    """

    kind: Literal["amcl"] = "amcl"
    heads: int = Field(default=3, ge=1)
    base: Literal["infonce", "simclr", "moco", "simsiam", "barlow"] = "infonce"
    aggregate: Literal["soft", "top"] = "soft"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    in_view: bool = False
    kappa: int | None = Field(default=None, ge=1)
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    eta_low: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    eta_up: float = Field(default=0.15, gt=0, allow_inf_nan=False)
    width: int = Field(default=64, ge=1)
    detach: bool = True
    off_diagonal: float = Field(default=0.0051, ge=0, allow_inf_nan=False)
    published: bool = False
    batch: int | None = Field(default=None, ge=2)
    dim: int | None = Field(default=None, ge=1)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"heads": 2},
            {"heads": 2, "detach": False, "beta": 0.1, "in_view": True},
            {"base": "simclr", "heads": 1, "detach": False},
            {"base": "infonce", "aggregate": "top", "heads": 2, "kappa": 3, "detach": False},
            {"base": "simsiam", "heads": 2},
            # Bounds as they are for `barlow`: below 1 / 2, mismatched dimensions would be best.
            {"base": "barlow", "heads": 2, "eta_low": 0.5, "eta_up": 1.5, "detach": False},
            {"published": True, "heads": 2, "kappa": 5},
        ]

    def differentiable(self) -> bool:
        return not self.detach and self.base != "simsiam"

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("published"):
            value = {"base": "simclr"} | value
            return PUBLISHED | PUBLISHED_BASES.get(value["base"], {}) | value
        if value.get("base") == "barlow":
            # A correlation's best is its temperature: it must be able to reach 1.
            return {"eta_low": 0.5, "eta_up": 1.5, "beta": 1.0} | value
        return ({"kappa": 16} | value) if value.get("aggregate") == "top" else value

    @model_validator(mode="after")
    def _fits(self) -> AMCLConfig:
        if self.eta_low > self.eta_up:
            raise ValueError(f"needs eta_low <= eta_up, got eta_low={self.eta_low} eta_up={self.eta_up}")
        if self.published:
            self._as_published()
        elif self.base == "moco":
            raise ValueError("base: moco is the authors'; set published: true, or name pairs of a view and a teacher's")
        elif self.aggregate == "soft" and self.kappa is not None:
            raise ValueError(f"kappa={self.kappa} is for aggregate: top; remove it, or set aggregate: top")
        if (self.batch is not None) != (self.published and self.base == "barlow"):
            raise ValueError(
                f"got batch={self.batch} with base={self.base!r} and published={self.published}; the authors' Barlow "
                "Twins, and nothing else, needs the number of rows of a gathered batch"
            )
        return self

    def _as_published(self) -> None:
        if self.base not in PUBLISHED_BASES:
            raise ValueError(f"published: true has the bases {', '.join(PUBLISHED_BASES)}, not {self.base}")
        for key, wanted in PUBLISHED_BASES[self.base].items():
            if key != "beta" and getattr(self, key) != wanted:
                raise ValueError(
                    f"published: true with base: {self.base} has {key}={wanted}, got {getattr(self, key)}; remove {key}"
                )

    def projection_heads(self) -> int:
        return self.heads

    def for_dim(self, dim: int) -> AMCLConfig:
        return self.model_copy(update={"dim": agreed_dim(self.dim, dim)})

    def check(self, views: Sequence[str]) -> None:
        pairs_of(self.pairs, views)

    def build(self, views: Sequence[str], collectives: Collectives) -> AMCL | BarlowAMCL:
        if self.dim is None:
            raise ValueError("amcl's networks read dim / heads numbers; build it with dim=WIDTH, that of the tables")
        if self.dim % self.heads:
            raise ValueError(
                f"rows of dim={self.dim} are not those of heads={self.heads} of equal width; give a multiple as dim"
            )
        pairs, width = pairs_of(self.pairs, views), self.dim // self.heads
        if self.base != "barlow":
            return AMCL(self, pairs, width, collectives)
        network = self.network(self.batch or width, detach=self.detach and self.published)
        return BarlowAMCL(pairs, self.heads, width, network, self.beta, self.off_diagonal, self.batch)

    def network(self, inputs: int, detach: bool) -> TemperatureNetwork:
        outputs = inputs if self.published else self.width
        return TemperatureNetwork(inputs, self.width, outputs, (self.eta_low, self.eta_up), detach)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        pairs, one = pair_count(self.pairs, views), dim // self.heads
        if self.base == "barlow":
            codes = 4 * self.heads * one * ((self.batch or one) + self.width)
            held = pairs * (6 * gathered * dim + 8 * self.heads * one**2 + codes)
            return super().memory(views, rows, gathered, dim) + held * 4
        # Rows by head twice, the network's layers and codes, and their gradients: of anchors and of candidates.
        code = one if self.published else self.width
        tables = 2 * views * (rows + gathered) * (2 * dim + self.heads * (2 * self.width + code))
        if self.base == "simsiam":
            searched = 2 * pairs * rows * 2 * dim
        elif self.aggregate == "soft":
            searched = min(SIX_TILES, 6 * rows * gathered) + 4 * pairs * (rows + gathered) * self.heads * 4
        else:
            searched = 2 * pairs * rows * (self.kappa or 1) * 2 * self.heads * (one + code + 4)
            searched += 2 * self.heads * min(rows, ROWS) * min(gathered, COLUMNS)
        return super().memory(views, rows, gathered, dim) + (tables + searched) * 4


class AMCL(nn.Module):
    """Mean over pairs {u, v}, both directions and their anchors of the loss of Wang et al. 2024 (arXiv 2310.05615).

    With heads c = 1..H of d' numbers each, s_ij the cosine of a pair of rows in one head, and
    Omega(tau) = (d'/2) log tau + 1 / tau, an anchor i of u costs, on the average of the heads,

        l_i = cost_i+ + log sum_(j in v) e^(-cost_ij),    cost_ij = -s_ij / tau_ij + beta Omega(tau_ij)
        tau_ij = eta_low + (eta_up - eta_low) sigmoid( -<phi(h_i), phi(h_j)> ),    h_i the outputs of one head

    with one network phi for all heads and views. cost is, for beta 1, the negative log-likelihood of a Gaussian around
    the anchor whose variance is tau: l_i is the cross-entropy of guessing which candidate is the anchor's own. Where
    the bounds are equal the temperature is one and beta cancels: l_i is the mean of the heads' InfoNCE, and with
    `in_view` of their NT-Xent. `base: simclr` leaves rows of the anchor's own id out of the sum.

    `aggregate: top` has, in place of the log-sum-exp, minus the mean cost of the kappa candidates of other ids that are
    most similar; `infonce` chooses them among negatives and the positive. There, and in `simclr`, nothing holds the
    loss from below but the bounds of tau; with the positive in the log-sum-exp it is not below 0.

    `simsiam`: no negatives, an MLP g a head, its output of length one and compared with the other view without
    gradient: -1/2 <g(h_i), h_i+> / tau + beta Omega(tau), and the same of the other direction; g starts near the
    identity.

    `published`: the authors' code, version 2.0. Summed over heads, T the kappa most similar negatives,

        l_i = sum_c [ -s_i+ / tau_i+ + beta Omega(tau_i+)
                      + (1/kappa) sum_(n in T) s_in / tau_in - beta sum_(n in T) (log tau_in + 1 / tau_in) ]

    and a g with batch norm, over the gathered batch. Rows of the anchor's own id in a queue are no negatives here.

    Rows of equal ids are positives: their similarities, and the logits of their temperatures, are averaged. An anchor
    counts where it has a positive in v and, but for soft `infonce` and `simsiam`, where it has a negative. Absent rows
    count nowhere. Parts are means over rows, so that ranks' may be averaged: temperatures are counted by quarters of
    their range, and their correlation with similarity is that of each anchor's negatives. Where all rows are candidates
    these figures are of the first 128 gathered ones.

    Cost for b of n rows: soft, 8 b n (d + H width) multiplications a direction, forward and backward; top, b n d.
    Memory: O(n (d + H width)) a view, and a tile; top, b kappa rows a direction. State: phi, and `simsiam`'s g.
    """

    def __init__(self, config: AMCLConfig, pairs: list[tuple[str, str]], width: int, collectives: Collectives):
        super().__init__()
        self.config, self.pairs, self.width, self.collectives = config, pairs, width, collectives
        self.network = config.network(width, config.detach)
        self.has_negatives = config.base != "simsiam"
        if not self.has_negatives:
            made = (
                NormedPredictor(width) if config.published else NearIdentity(width, config.width) for _ in self.heads
            )
            self.predictors = nn.ModuleList(made)

    @property
    def heads(self) -> range:
        return range(self.config.heads)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        views = dict.fromkeys(v for pair in self.pairs for v in pair)
        candidates = {v: self.head_rows(gathered, v) for v in views}
        anchors = candidates
        if not self.has_negatives:
            anchors = {v: self.predicted(local, gathered, v) for v in views}
        elif local is not gathered:
            anchors = {v: self.head_rows(local, v) for v in views}
        parts: dict[str, Tensor] = {}
        losses, metrics = [], []
        for u, v in self.pairs:
            both = [(u, v)] if self.config.base == "moco" else [(u, v), (v, u)]
            found = [self.direction_loss(local, gathered, anchors, candidates, *direction) for direction in both]
            losses.append(torch.stack([x.pop("loss") for x in found]).mean())
            parts[f"loss/{u}-{v}"] = losses[-1].detach()
            if self.has_negatives:
                parts[f"accuracy/{u}-{v}"] = torch.stack([x.pop("accuracy") for x in found]).mean()
            metrics += found
        parts |= {name: torch.stack([x[name] for x in metrics]).mean() for name in metrics[0]}
        return Losses(torch.stack(losses).mean(), parts)

    def head_rows(self, table: Embeddings, v: str) -> HeadRows:
        """Rows by head, each of length one; without gradient where they are only targets."""
        h = self.by_head(table.z[v] if self.has_negatives else table.z[v].detach())
        return HeadRows(h, self.network(h), table.present[v], table.ids)

    def by_head(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n h c"]:
        return z.unflatten(1, (self.config.heads, self.width)) * self.config.heads**0.5

    def predicted(self, local: Embeddings, gathered: Embeddings, v: str) -> HeadRows:
        """What each local row is compared by: the output of its head's predictor."""
        whole = self.config.published  # statistics are of the whole batch
        table, own = (gathered, own_rows(local, self.collectives)) if whole else (local, slice(None))
        present = table.present[v]
        h = self.by_head(table.z[v])
        predicted = [normalize(g(x), dim=1) for g, x in zip(self.predictors, h[present].unbind(1))]
        h = torch.zeros_like(h).masked_scatter(present[:, None, None], torch.stack(predicted, dim=1))[own]
        return HeadRows(h, self.network(h), local.present[v], local.ids)

    def direction_loss(
        self,
        local: Embeddings,
        gathered: Embeddings,
        anchors: dict[str, HeadRows],
        candidates: dict[str, HeadRows],
        u: str,
        v: str,
    ) -> dict[str, Float[Tensor, ""]]:
        """Anchors of view u among the rows of view v: the loss and its parts, means over the batch (`BatchMean`)."""
        config, anchor, dim = self.config, anchors[u], self.width
        valid, all_valid = has_positive(local, gathered, u, v), has_positive(gathered, gathered, u, v)
        positive = positive_of(anchor, candidates[v], self.network)
        negative, hit, counts = None, None, config.base == "infonce"
        if not self.has_negatives:
            losses = positive.cost(2 * config.beta, dim)
        elif config.aggregate == "soft":
            own_view = candidates[u] if config.in_view else None
            scores = anchor, candidates[v], own_view, positive, self.network
            losses, hit = soft_losses(*scores, config.beta, positive_counts=counts)
        else:
            negative = hardest(anchor, self.negatives_of(candidates, u, v), self.network, config.kappa or 1)
            hit = (positive.similarity.mean(dim=1) > negative.mean).to(positive.similarity.dtype)
            if config.published:
                losses = published_losses(positive, negative, config.beta, dim)
            else:
                losses = top_losses(positive, negative, config.beta, dim, positive_counts=counts)
        if self.has_negatives and not (counts and config.aggregate == "soft"):
            others = self.negatives_of(candidates, u, v)
            valid = valid & has_negative(local.ids, others.ids, others.present)
            all_valid = all_valid & has_negative(gathered.ids, others.ids, others.present)
        mean = BatchMean.over(all_valid.sum(), local, gathered)
        weight = valid.to(losses.dtype) / mean.divisor(losses.dtype)  # of each row in a mean
        by_row = losses.sum(dim=1) if config.published else losses.mean(dim=1)
        found = {"loss": by_row.masked_fill(~valid, 0) @ weight}
        if hit is not None:
            found["accuracy"] = hit @ weight
        compared = candidates[v] if self.has_negatives else None
        return found | usage(anchor, compared, positive, negative, self.network, weight)

    def negatives_of(self, candidates: dict[str, HeadRows], u: str, v: str) -> HeadRows:
        """The rows that are negatives where they are of another id."""
        if self.config.base == "moco":
            return candidates[v]._replace(present=candidates[v].present & ~candidates[u].present)
        return HeadRows.cat([candidates[v], candidates[u]] if self.config.in_view else [candidates[v]])

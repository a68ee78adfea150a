"""Adaptive multi-head contrastive learning between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._correlations import correlations, off_diagonal
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._settings import agreed_dim, pair_count, pairs_of
from mvpretrain.objectives._temperature_network import (
    NearIdentity,
    Scored,
    TemperatureNetwork,
    agreement,
    histogram,
    omega,
)
from mvpretrain.similarity.blockwise import COLUMNS, ROWS, PairMask
from mvpretrain.similarity.groups import count_by_key, sum_by_key
from mvpretrain.similarity.positives import has_positive
from mvpretrain.similarity.top_k import top_k
from mvpretrain.types import Embeddings, Losses


class AMCLConfig(ObjectiveConfig):
    """Several heads a tower, the hardest negatives of each, and a learned temperature for every pair and head.

    `heads`: projections of one make that share `dim` equally. `base`: the loss that is extended; `simclr` leaves the
    positive out of the candidates, `infonce` has it among them, `simsiam` and `barlow` have no negatives. `pairs` are
    as in infonce. `kappa`: how many of the hardest negatives count, by their mean. `beta`: the weight of the
    temperatures' own term; 1 is a Gaussian likelihood. Temperatures lie in [`eta_low`, `eta_up`] (by default [0.5, 1.5]
    for `barlow`), fixed where these are equal. `width`: of the hidden layers of the temperature network and of
    SimSiam's predictors. `detach`: rows go into the temperature network without gradient. `off_diagonal`: Barlow's
    lambda. `dim` is derived from the recipe's.

    The paper searched kappa, beta and the bounds for each data set; its values are not known to us. The defaults are
    ours, by short runs on small data. There, towers needed `head: {layers: 2, norm: batch}`: with layer norm the
    hardest negatives drew all rows together, as the one hardest alone (kappa 1) did on photographs, whatever the norm.
    """

    kind: Literal["amcl"] = "amcl"
    heads: int = Field(default=4, ge=1)
    base: Literal["simclr", "infonce", "simsiam", "barlow"] = "simclr"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    kappa: int = Field(default=16, ge=1)
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    eta_low: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    eta_up: float = Field(default=0.15, gt=0, allow_inf_nan=False)
    width: int = Field(default=64, ge=1)
    detach: bool = True
    off_diagonal: float = Field(default=0.0051, ge=0, allow_inf_nan=False)
    dim: int | None = Field(default=None, ge=1)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"base": "infonce", "heads": 2, "kappa": 3, "detach": False},
            {"base": "simsiam", "heads": 2},
            # Bounds as they are for `barlow`: below 1 / 2, mismatched dimensions would be best.
            {"base": "barlow", "heads": 2, "eta_low": 0.5, "eta_up": 1.5, "detach": False},
            {"heads": 1, "kappa": 5, "detach": False},
        ]

    def differentiable(self) -> bool:
        return not self.detach and self.base != "simsiam"

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_barlow(cls, value: Any) -> Any:
        # A correlation's best is its temperature: it must be able to reach 1.
        own = {"eta_low": 0.5, "eta_up": 1.5}
        return own | value if isinstance(value, dict) and value.get("base") == "barlow" else value

    @model_validator(mode="after")
    def _bounds(self) -> AMCLConfig:
        if self.eta_low > self.eta_up:
            raise ValueError(f"needs eta_low <= eta_up, got eta_low={self.eta_low} eta_up={self.eta_up}")
        return self

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
            fits = -(-self.dim // self.heads) * self.heads
            raise ValueError(f"dim={self.dim} does not divide into heads={self.heads}; set dim={fits}")
        kind = BarlowAMCL if self.base == "barlow" else AMCL
        return kind(self, pairs_of(self.pairs, views), self.dim // self.heads)

    def network(self, inputs: int, detach: bool) -> TemperatureNetwork:
        return TemperatureNetwork(inputs, self.width, self.eta_low, self.eta_up, detach)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        pairs = pair_count(self.pairs, views)
        if self.base == "barlow":
            held = pairs * (6 * gathered * dim + 6 * dim**2 // self.heads)
            return super().memory(views, rows, gathered, dim) + held * 4
        # Head outputs twice, and the network's layers: of anchors, positives, negatives. SimSiam has no negatives, and
        # predictors that hold as much as one.
        negatives, one = self.base != "simsiam", 2 * dim + self.heads * (3 * self.width + 8)
        held = 2 * pairs * rows * ((self.kappa if negatives else 1) + 2) * one
        search = self.heads * min(rows, ROWS) * min(gathered, COLUMNS) if negatives else 0
        # Gradients of two selections of a view's rows, each as large as the whole table of it.
        return super().memory(views, rows, gathered, dim) + (held + 2 * search + 2 * gathered * dim) * 4


class Negatives(NamedTuple):
    scored: Scored  # b h kappa, the hardest first
    valid: Bool[Tensor, "b h kappa"]  # False where there are fewer than kappa
    column: Int[Tensor, "b h kappa"]
    mean: Float[Tensor, " b"]  # the largest mean over heads


class AMCL(nn.Module):
    """Mean over pairs {u, v}, both directions and their anchors of the loss of Wang et al. 2024 (arXiv 2310.05615).

    With heads c = 1..H of d' = d / H numbers each, s_ij^c the cosine of a pair of rows in one head, N_i^c the kappa
    rows of v of other ids that are most similar to the anchor i of u, and Omega(tau) = (d'/2) log tau + 1 / tau:

        l_i = sum_c [ -s_i+ / tau_i+ + beta Omega(tau_i+) + mean_(n in N_i) ( s_in / tau_in - beta Omega(tau_in) ) ]
        tau_ij = eta_low + (eta_up - eta_low) sigmoid( <phi(h_i), phi(h_j)> ),   h_i the outputs of one head

    with one network phi for all heads and views. -s / tau + Omega(tau) is the negative log-likelihood of a Gaussian
    around the anchor whose variance is tau; negatives enter with the opposite sign. `infonce`: the kappa are chosen
    among negatives and the positive. `simsiam`: no negatives, an MLP g a head, its output of length one and compared
    with the other view without gradient: -1/2 <g(h_i), h_i+> / tau + beta Omega(tau), and the same of the other
    direction; g starts near the identity.

    Without bounds there is no minimum: the negatives' term falls without end as tau grows (-(d'/2) log tau), and, where
    s < beta, as tau goes to 0. A positive's best, tau = 2 (beta - s) / (beta d'), is mostly below eta_low; and as
    <phi(h), phi(h)> >= 0, pairs of like outputs never get less than the middle of the range. So the bounds decide; in
    our runs all temperatures came to the middle. `detach` is the default because through phi the encoders can lower the
    loss by moving rows to where temperatures suit, related or not: without it ours did, and matched nothing.

    Rows of equal ids are positives: their similarities, and the logits of their temperatures, are averaged, and
    `infonce` takes them for one candidate. An anchor counts where it has a positive in v and where v holds another id
    (for `simsiam`, the former). Absent rows count nowhere. Parts are means over rows, so that ranks' may be averaged:
    temperatures are therefore counted by quarters of their range, not by quantiles.

    Cost for b of n rows: 2 b n d multiplications a pair, for the search, which has no gradient. Memory: O(n d), b kappa
    rows a direction, a tile. State: phi, and `simsiam`'s g.
    """

    def __init__(self, config: AMCLConfig, pairs: list[tuple[str, str]], width: int):
        super().__init__()
        self.config, self.pairs, self.width = config, pairs, width
        self.network = config.network(width, config.detach)
        self.has_negatives = config.base != "simsiam"
        if not self.has_negatives:
            self.predictors = nn.ModuleList(NearIdentity(width, config.width) for _ in range(config.heads))

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        parts: dict[str, Tensor] = {}
        losses, metrics = [], []
        for u, v in self.pairs:
            one, other = self.direction_loss(local, gathered, u, v), self.direction_loss(local, gathered, v, u)
            losses.append((one.pop("loss") + other.pop("loss")) / 2)
            parts[f"loss/{u}-{v}"] = losses[-1].detach()
            if self.has_negatives:
                parts[f"accuracy/{u}-{v}"] = (one.pop("accuracy") + other.pop("accuracy")) / 2
            metrics += [one, other]
        parts |= {name: torch.stack([of[name] for of in metrics]).mean() for name in metrics[0]}
        return Losses(torch.stack(losses).mean(), parts)

    def direction_loss(self, local: Embeddings, gathered: Embeddings, u: str, v: str) -> dict[str, Float[Tensor, ""]]:
        """Anchors of view u among the rows of view v: the loss and its parts, means over the batch (`BatchMean`)."""
        h = self.heads(local.z[u])
        if not self.has_negatives:
            h = torch.stack([normalize(g(x), dim=1) for g, x in zip(self.predictors, h.unbind(1))], dim=1)
        code = self.network(h)
        positive = self.positive(h, code, local.ids, gathered, v)
        valid, all_valid = has_positive(local, gathered, u, v), has_positive(gathered, gathered, u, v)
        negative, losses = None, positive.cost(2 * self.config.beta, self.width)
        if self.has_negatives:
            ids = gathered.ids[gathered.present[v]]
            several = (ids != ids[:1]).any()  # else nothing is a negative
            valid, all_valid = valid & several, all_valid & several
            negative = self.negatives(h, code, local, gathered, u, v)
            losses = positive.cost(self.config.beta, self.width) - self.negative_cost(positive, negative)
        mean = BatchMean.over(all_valid.sum(), local, gathered)
        weight = valid.to(losses.dtype) / mean.divisor(losses.dtype)  # of each row in a mean
        loss = losses.sum(dim=1).masked_fill(~valid, 0) @ weight
        return {"loss": loss, **self.metrics(positive, negative, weight)}

    def heads(self, z: Float[Tensor, "b n"]) -> Float[Tensor, "b h d"]:
        """Rows by head, each of length one."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z.unflatten(1, (self.config.heads, self.width)) * self.config.heads**0.5

    def positive(
        self,
        h: Float[Tensor, "b h d"],
        code: Float[Tensor, "b h w"],
        ids: Int[Tensor, " b"],
        gathered: Embeddings,
        v: str,
    ) -> Scored:
        """Each anchor against the mean of the rows of view v that carry its id; both products are linear in them."""
        same_id = torch.isin(gathered.ids, ids)
        rows, present = self.heads(gathered.z[v][same_id]), gathered.present[v][same_id]
        rows = rows if self.has_negatives else rows.detach()
        both = torch.cat([rows, self.network(rows)], dim=2) * present[:, None, None].to(rows.dtype)
        count = count_by_key(gathered.ids[same_id], present, ids).clamp_min(1)
        mean = sum_by_key(gathered.ids[same_id], both.flatten(1), ids) / count[:, None]
        row, its_code = mean.unflatten(1, both.shape[1:]).split([self.width, code.shape[2]], dim=2)
        return Scored((h * row).sum(dim=2), self.network.between(code, its_code))

    def negatives(
        self,
        h: Float[Tensor, "b h d"],
        code: Float[Tensor, "b h w"],
        local: Embeddings,
        gathered: Embeddings,
        u: str,
        v: str,
    ) -> Negatives:
        """The kappa rows of view v and another id that are most similar to each anchor in each head."""
        table = gathered.z[v].unflatten(1, (self.config.heads, self.width))
        scale = self.config.heads**0.5
        mask = PairMask(local.present[u], gathered.present[v], local.ids, gathered.ids)
        found = top_k(h * scale, table, self.config.kappa, mask)
        head = torch.arange(self.config.heads, device=h.device)[:, None]
        rows = table[found.column, head].to(h.dtype) * scale
        similarity = (h[:, :, None] * rows).sum(dim=3)
        temperature = self.network.between(code[:, :, None], self.network(rows))
        return Negatives(Scored(similarity, temperature), found.similarity > -torch.inf, found.column, found.mean)

    def negative_cost(self, positive: Scored, negative: Negatives) -> Float[Tensor, "b h"]:
        """What the hardest candidates cost as if they were positives, on average."""
        costs, valid = negative.scored.cost(self.config.beta, self.width), negative.valid
        if self.config.base == "infonce":
            own = positive.similarity[..., None]
            similarity = torch.cat([negative.scored.similarity.masked_fill(~valid, -torch.inf), own], dim=2)
            chosen = similarity.detach().topk(self.config.kappa, dim=2).indices
            own_cost = positive.cost(self.config.beta, self.width)[..., None]
            costs = torch.cat([costs, own_cost], dim=2).gather(2, chosen)
            valid = torch.cat([valid, torch.ones_like(own, dtype=torch.bool)], dim=2).gather(2, chosen)
        return costs.masked_fill(~valid, 0).sum(dim=2) / valid.sum(dim=2).clamp_min(1)

    @torch.no_grad()
    def metrics(
        self, positive: Scored, negative: Negatives | None, weight: Float[Tensor, " b"]
    ) -> dict[str, Float[Tensor, ""]]:
        """How temperatures and heads are used: means over anchors, each row's weight in them given."""
        low, up, heads = self.config.eta_low, self.config.eta_up, range(self.config.heads)
        by_name = {"positive": (positive.temperature[..., None], torch.ones_like(positive.similarity[..., None]))}
        found = {"heads/spread": weight @ positive.similarity.std(dim=1, correction=0)}
        if negative:
            by_name["negative"] = (negative.scored.temperature, negative.valid.to(weight.dtype))
            hardest_one = negative.scored.similarity[:, :, 0]
            clearest = (positive.similarity - hardest_one).argmax(dim=1)
            found |= {f"heads/usage/{c}": weight @ (clearest == c).to(weight.dtype) for c in heads}
            found["heads/shared_negatives"] = weight @ agreement(negative.column[:, :, 0]).to(weight.dtype)
            found["accuracy"] = weight @ (positive.similarity.mean(dim=1) > negative.mean).to(weight.dtype)
        for name, (temperature, counted) in by_name.items():
            mean = weight @ ((temperature * counted).sum(dim=2) / counted.sum(dim=2).clamp_min(1))
            found |= {f"temperature/{name}/head{c}": mean[c] for c in heads}
            for quarter, part in histogram(temperature, counted, low, up).items():
                found[f"temperature/{name}/{quarter}"] = weight @ part
        return found


class BarlowAMCL(nn.Module):
    """Mean over pairs {u, v} of adaptive Barlow Twins (same paper), on the gathered batch. With C the d' x d' matrix of
    correlations between the dimensions of a head in the two views, and summed over heads:

        sum_l (1 - C_ll / tau_ll)^2 + lambda sum_(l != m) C_lm^2 / tau_lm
            + beta sum_l Omega(tau_ll) - beta sum_(l != m) Omega(tau_lm)

    How the authors feed phi for pairs of dimensions is not known to us. Here every dimension of every head has a
    learned code of d' numbers, which phi reads as it reads rows elsewhere; tau_lm is that of the codes of l and m.

    A correlation's best is tau, not 1: bounds below 1 leave dimensions less than fully correlated. Correlations are
    those of the kind `barlow`; a pair with fewer than two rows is 0. Cost: n d d' multiplications a pair. State: phi
    and the codes.
    """

    def __init__(self, config: AMCLConfig, pairs: list[tuple[str, str]], width: int):
        super().__init__()
        self.config, self.pairs, self.width = config, pairs, width
        # Codes have no encoder whose rows the temperatures could move: they are learned from their gradient.
        self.network = config.network(width, detach=False)
        self.codes = nn.Parameter(torch.randn(config.heads, width, width) / width**0.5)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        code = self.network(self.codes)
        temperature = self.network.between(code[:, :, None], code[:, None])
        own, others = temperature.diagonal(dim1=1, dim2=2), off_diagonal(temperature)
        price = self.config.beta * (omega(own, self.width).sum() - omega(others, self.width).sum())
        parts = {f"temperature/own/head{c}": x.mean().detach() for c, x in enumerate(own)}
        parts |= {f"temperature/others/head{c}": x.sum().detach() / max(len(x), 1) for c, x in enumerate(others)}
        values = []
        for u, v in self.pairs:
            both = gathered.present[u] & gathered.present[v]
            correlation = self.by_head(gathered.z[u][both], gathered.z[v][both])
            diagonal = correlation.diagonal(dim1=1, dim2=2)
            squares = off_diagonal(correlation).square() / others
            value = (1 - diagonal / own).square().sum() + self.config.off_diagonal * squares.sum() + price
            values.append(value * (both.sum() > 1))
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            parts[f"correlation/{u}-{v}"] = diagonal.mean().detach()
        return Losses(torch.stack(values).mean(), parts)

    def by_head(self, a: Float[Tensor, "m n"], b: Float[Tensor, "m n"]) -> Float[Tensor, "h d d"]:
        # The pieces have the length 1 / sqrt(H); correlations expects unit rows.
        pieces = zip(*((x * self.config.heads**0.5).split(self.width, dim=1) for x in (a, b)))
        return torch.stack([correlations(x, y) for x, y in pieces])

"""InfoNCE between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from mvpretrain.config import unknown
from mvpretrain.exchange import Exchange
from mvpretrain.objectives import ObjectiveConfig, Temperature
from mvpretrain.similarity import all_pairs, anchored
from mvpretrain.types import Embeddings, Losses

GATHERED = 2**31  # bytes of everyone's table above which `auto` takes the ring


class InfoNCEConfig(ObjectiveConfig):
    """Pairwise InfoNCE: `pairs` is `all`, a view name (that view against each other one), or a list of pairs.

    `weights` scales pairs by name ("image-text": 2.0; 1 where not named). `in_view: true` adds the other samples of
    the anchor's own view to its denominator: with two augmentations of one image this is SimCLR's NT-Xent. `table`:
    everyone's rows are gathered, or passed round a ring of ranks, which takes no memory that grows with the number of
    ranks; `auto` gathers up to 2 GiB.
    """

    kind: Literal["infonce"] = "infonce"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    weights: dict[str, float] = {}
    temperature: Temperature = Temperature()
    in_view: bool = False
    table: Literal["auto", "gather", "ring"] = "auto"

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
        return InfoNCE(self, self.listed(views), exchange)


class InfoNCE(nn.Module):
    """Weighted mean over pairs {u, v} of the symmetric InfoNCE, exact on the gathered batch.

    For an anchor row i of view u, with P(i) the rows of v that carry i's id:

        l_i = log sum_{j in v} exp(s_ij / tau) - mean_{p in P(i)} s_ip / tau

    and the pair's value is the mean over the rows of u that have a positive in v, averaged with v against u. With one
    positive per row this is the softmax cross-entropy of van den Oord et al. 2018 (eq. 4) in both directions (CLIP);
    with several, the outside form of Khosla et al. 2020 (eq. 2). With `in_view`, log-sum-exp runs over the rows of u
    with another id as well (NT-Xent, Chen et al. 2020, eq. 1).

    Rows that are absent in u or v count neither as anchors nor as candidates; a pair without rows is 0. Cost for b of n
    rows: 4 b n d multiplications a pair, both directions and the gradient. State: log tau, shape [1] or [pairs].
    """

    def __init__(self, config: InfoNCEConfig, pairs: list[tuple[str, str]], exchange: Exchange):
        super().__init__()
        self.pairs, self.config, self.exchange = pairs, config, exchange
        self.views = len({v for pair in pairs for v in pair})
        weights = [config.weights.get(f"{u}-{v}", 1.0) for u, v in pairs]
        self.weights = [w / sum(weights) for w in weights]
        self.log_temperature = config.temperature.parameter(len(pairs) if config.temperature.per_pair else 1)

    def gathers(self, rows: int, dim: int) -> bool:
        """Whether a table of this many rows a rank is gathered, or passed round the ring of ranks."""
        if self.config.table != "auto":
            return self.config.table == "gather"
        return rows * self.exchange.size * dim * self.views * 4 <= GATHERED

    def forward(self, local: Embeddings, every: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        per_pair = temperature.expand(len(self.pairs))
        found = all_pairs(local, every, self.pairs, 1 / per_pair, self.exchange)
        others = self._in_view(local, every, 1 / per_pair)
        parts: dict[str, Tensor] = {}
        values = []
        for p, (u, v) in enumerate(self.pairs):
            scale = 1 / per_pair[p]
            there = anchored(local, every, found[u, v], scale, others.get((p, u)))
            back = anchored(local, every, found[v, u], scale, others.get((p, v)))
            values.append((there.loss + back.loss) / 2)
            parts[f"loss/{u}-{v}"] = values[-1].detach()
            parts[f"accuracy/{u}-{v}"] = (there.accuracy + back.accuracy) / 2
            if self.config.temperature.per_pair:
                parts[f"temperature/{u}-{v}"] = per_pair[p].detach()
        if not self.config.temperature.per_pair:
            parts["temperature"] = temperature[0].detach()
        total = sum(w * value for w, value in zip(self.weights, values))
        assert isinstance(total, Tensor)
        return Losses(total, parts)

    def _in_view(
        self, local: Embeddings, every: Embeddings, scales: Float[Tensor, " p"]
    ) -> dict[tuple[int, str], Float[Tensor, " b"]]:
        """(pair, view) -> log-sum-exp of each local row over the other samples of its own view."""
        if not self.config.in_view:
            return {}
        # With one temperature for all, a view's sums serve all of its pairs, and one call finds those of every view.
        shared = not self.config.temperature.per_pair
        asked = [tuple({v: None for pair in self.pairs for v in pair})] if shared else self.pairs
        sums = {}
        for p, views in enumerate(asked):
            scale = scales[p].expand(len(views))
            own = all_pairs(local, every, [(v, v) for v in views], scale, self.exchange, apart=True)
            sums |= {(p, v): own[v, v].lse for v in views}
        return {(p, v): sums[0 if shared else p, v] for p, pair in enumerate(self.pairs) for v in pair}

"""InfoNCE between pairs of k views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from mvpretrain.config import unknown
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._pair_losses import pair_loss
from mvpretrain.objectives._settings import Temperature, pairs_of
from mvpretrain.similarity.all_pairs import all_pairs
from mvpretrain.similarity.per_anchor import GradientMode, per_anchor
from mvpretrain.similarity.positives import has_positive
from mvpretrain.similarity.tables import AnchorSums, Direction, directions_of
from mvpretrain.types import AnchorWeighting, Embeddings, Losses

GATHERED = 2**31  # bytes of the gathered table above which `auto` takes the ring


class InfoNCEConfig(ObjectiveConfig):
    """Pairwise InfoNCE: `pairs` is `all`, a view name (that view against each other one), or a list of pairs.

    `weights` scales pairs by name ("image-text": 2.0; 1 where not named). `in_view: true` adds the other samples of
    the anchor's own view to its denominator: with two augmentations of one image this is SimCLR's NT-Xent. `table`:
    the rows of every rank are gathered, or passed round a ring of ranks, which takes no memory that grows with the
    number of ranks; `auto` gathers up to 2 GiB. `gradient: scalars` sends numbers instead of gradients of rows between
    ranks, at two and a half times the multiplications and the same result.
    """

    kind: Literal["infonce"] = "infonce"
    pairs: str | tuple[tuple[str, str], ...] = "all"
    weights: dict[str, float] = {}
    temperature: Temperature = Temperature()
    in_view: bool = False
    table: Literal["auto", "gather", "ring"] = "auto"
    gradient: GradientMode = "features"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"in_view": True},
            {"in_view": True, "gradient": "scalars"},
            {"in_view": True, "table": "ring", "temperature": {"init": 0.2, "per_pair": True}},
            {"pairs": "view0", "weights": {"view0-view1": 2.5}, "temperature": {"init": 0.2, "per_pair": True}},
        ]

    @model_validator(mode="after")
    def _table_is_gathered(self) -> InfoNCEConfig:
        if self.gradient == "scalars" and self.table == "ring":
            raise ValueError(
                "gradient: scalars needs everyone's rows at hand; set table: gather, or gradient: features"
            )
        return self

    def check(self, views: Sequence[str]) -> None:
        names = [f"{u}-{v}" for u, v in pairs_of(self.pairs, views)]
        for name, weight in self.weights.items():
            if name not in names:
                raise ValueError(unknown("pair in objective.weights", name, names))
            if weight < 0:
                raise ValueError(f"objective.weights.{name} is {weight}, weights are not negative")
        if sum(self.weights.get(n, 1.0) for n in names) <= 0:
            raise ValueError("objective.weights leaves no pair with a weight above 0")

    def build(self, views: Sequence[str], collectives: Collectives) -> InfoNCE:
        return InfoNCE(self, pairs_of(self.pairs, views), collectives)


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

    def __init__(self, config: InfoNCEConfig, pairs: list[tuple[str, str]], collectives: Collectives):
        super().__init__()
        self.pairs, self.config, self.collectives = pairs, config, collectives
        self.views = len({v for pair in pairs for v in pair})
        self.directions = directions_of(pairs)
        self.weighting: AnchorWeighting | None = None
        weights = [config.weights.get(f"{u}-{v}", 1.0) for u, v in pairs]
        self.weights = [w / sum(weights) for w in weights]
        self.log_temperature = config.temperature.parameter(len(pairs) if config.temperature.per_pair else 1)

    def gathers(self, rows: int, dim: int) -> bool:
        """See `ChoosesGather`; where not, the tables are passed round the ring of ranks."""
        if self.config.table != "auto" or self.config.gradient == "scalars":
            return self.config.table != "ring"
        return rows * self.collectives.size * dim * self.views * 4 <= GATHERED

    def weight_anchors(self, weighting: AnchorWeighting) -> None:
        self.weighting = weighting

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        per_pair = temperature.expand(len(self.pairs))
        sums = self._sums(local, gathered, self.pairs, 1 / per_pair, exclude_same_id=False)
        in_view = self._in_view(local, gathered, 1 / per_pair)
        parts: dict[str, Tensor] = {}
        values = []
        for p, (u, v) in enumerate(self.pairs):
            pair = pair_loss(local, gathered, (u, v), sums, 1 / per_pair[p], in_view[p], self.weighting)
            values.append(pair.loss)
            parts[f"loss/{u}-{v}"] = pair.loss.detach()
            parts[f"accuracy/{u}-{v}"] = pair.accuracy
            if self.config.temperature.per_pair:
                parts[f"temperature/{u}-{v}"] = per_pair[p].detach()
        if not self.config.temperature.per_pair:
            parts["temperature"] = temperature[0].detach()
        total = sum(w * value for w, value in zip(self.weights, values))
        assert isinstance(total, Tensor)
        return Losses(total, parts)

    def _sums(
        self,
        local: Embeddings,
        gathered: Embeddings,
        pairs: list[tuple[str, str]],
        scales: Float[Tensor, " p"],
        exclude_same_id: bool,
    ) -> dict[Direction, AnchorSums]:
        """The anchors' sums of both directions of each pair; the same from either, but for how gradients are sent."""
        if self.config.gradient == "features":
            return all_pairs(local, gathered, pairs, scales, self.collectives, exclude_same_id)
        pair_of = {direction: p for p, pair in enumerate(pairs) for direction in directions_of([pair])}
        per_row = scales[list(pair_of.values()), None].expand(-1, len(local.ids))
        found = per_anchor(local, gathered, list(pair_of), per_row, self.collectives, exclude_same_id)
        return {
            (a, c): AnchorSums(f.lse, f.argmax, f.positive, f.is_anchor, has_positive(gathered, gathered, a, c).sum())
            for (a, c), f in zip(pair_of, found, strict=True)
        }

    def _in_view(
        self, local: Embeddings, gathered: Embeddings, scales: Float[Tensor, " p"]
    ) -> list[dict[str, Float[Tensor, " b"]]]:
        """For each pair, by view, the log-sum-exp of each local row over the other samples of its own view."""
        if not self.config.in_view:
            return [{} for _ in self.pairs]
        # With one temperature for all, a view's sums serve all of its pairs, and one call finds those of every view.
        shared = not self.config.temperature.per_pair
        asked = [tuple({v: None for pair in self.pairs for v in pair})] if shared else self.pairs
        found = []
        for p, views in enumerate(asked):
            own = [(v, v) for v in views]
            sums = self._sums(local, gathered, own, scales[p].expand(len(views)), exclude_same_id=True)
            found.append({v: sums[v, v].lse for v in views})
        return found * len(self.pairs) if shared else found

"""InfoNCE of each view against the average of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._pair_losses import pair_loss
from mvpretrain.objectives._settings import Temperature
from mvpretrain.similarity.all_pairs import all_pairs
from mvpretrain.similarity.groups import mean_of_others
from mvpretrain.similarity.tables import directions_of
from mvpretrain.types import AnchorWeighting, Embeddings, Losses

SHORTEST = 1e-3  # views that cancel have a mean without direction: a shorter one is not stretched to length one


class OneVsRestConfig(ObjectiveConfig):
    """One view against the average of the rest: k problems instead of the k (k - 1) / 2 of all pairs.

    `normalize`: whether the average is brought to length one. `temperature.per_pair` learns one for each view.
    """

    kind: Literal["one_vs_rest"] = "one_vs_rest"
    normalize: bool = True
    temperature: Temperature = Temperature()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"normalize": False}, {"temperature": {"init": 0.2, "per_pair": True}}]

    def build(self, views: Sequence[str], collectives: Collectives) -> OneVsRest:
        return OneVsRest(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # Averages: their sums, themselves and their gradients; local rows: the same, and gradients of their own.
        averages = views * (3 * gathered + 6 * rows) + gathered + rows
        return super().memory(views, rows, gathered, dim) + averages * dim * 4


class OneVsRest(nn.Module):
    """Mean over views u of the symmetric InfoNCE of u against the average of the other views, on the gathered batch.

    With a_i^u the mean of z_i^v over the views v != u that row i has (of length one with `normalize`):

        L = mean_u [ CE(<z_i^u, a_j^u> / tau) + CE(<a_i^u, z_j^u> / tau) ] / 2

    CE over j with target i, as in infonce: rows of equal ids are positives of one another, by the mean of their
    similarities. The `ave` baseline of Piran et al. 2024 (M3G); with k = 2 it is infonce.

    A row without u, or without any other view, has no z^u or no a^u and counts there neither as an anchor nor as a
    candidate. Cost for b of n rows: k b n d multiplications; memory O(k n d) and one tile. State: log tau, shape [1]
    or [k].
    """

    def __init__(self, config: OneVsRestConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, list(views), collectives
        self.pairs = [(u, rest_of(u)) for u in self.views]
        self.directions = directions_of(self.pairs)
        self.weighting: AnchorWeighting | None = None
        self.log_temperature = config.temperature.parameter(len(self.views) if config.temperature.per_pair else 1)

    def weight_anchors(self, weighting: AnchorWeighting) -> None:
        self.weighting = weighting

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        per_view = temperature.expand(len(self.views))
        local, gathered = self.with_rest(local), self.with_rest(gathered)
        sums = all_pairs(local, gathered, self.pairs, 1 / per_view, self.collectives)
        parts: dict[str, Tensor] = {}
        values = []
        for index, (u, rest) in enumerate(self.pairs):
            pair = pair_loss(local, gathered, (u, rest), sums, 1 / per_view[index], {}, self.weighting)
            values.append(pair.loss)
            parts[f"loss/{u}"] = pair.loss.detach()
            parts[f"accuracy/{u}"] = pair.accuracy
            if self.config.temperature.per_pair:
                parts[f"temperature/{u}"] = per_view[index].detach()
        if not self.config.temperature.per_pair:
            parts["temperature"] = temperature[0].detach()
        return Losses(torch.stack(values).mean(), parts)

    def with_rest(self, table: Embeddings) -> Embeddings:
        """The table with, for each view, the average of the others as one more view."""
        means, has_rest = mean_of_others({v: table.z[v] for v in self.views}, {v: table.present[v] for v in self.views})
        if self.config.normalize:
            means = {v: normalize(z, dim=1, eps=SHORTEST) for v, z in means.items()}
        return table._replace(
            z=table.z | {rest_of(v): z for v, z in means.items()},
            present=table.present | {rest_of(v): p for v, p in has_rest.items()},
        )


def rest_of(view: str) -> str:
    return f"all but {view}"

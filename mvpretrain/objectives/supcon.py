"""Supervised contrastive learning over k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean, own_rows
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._settings import Temperature
from mvpretrain.similarity.all_pairs import all_pairs
from mvpretrain.similarity.groups import classes, count_by_key, sum_by_key
from mvpretrain.similarity.log_sum_exp import add_log_sums
from mvpretrain.types import Embeddings, Losses


class SupConConfig(ObjectiveConfig):
    """Rows of one label are positives, in every view. Needs the class as `data.label`; rows without one count by id."""

    kind: Literal["supcon"] = "supcon"
    temperature: Temperature = Temperature()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"temperature": {"init": 0.1, "learnable": False}}]

    def check(self, views: Sequence[str]) -> None:
        self.temperature.refuse_per_pair("supcon has one denominator over all views and so one temperature")

    def build(self, views: Sequence[str], collectives: Collectives) -> SupCon:
        return SupCon(self, views, collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # All views: the gradients of both passes while they are added up; local rows: their positives besides; and
        # the sums by class and by id of one view.
        tables = views * (2 * gathered + 3 * rows) + 4 * (gathered + rows)
        return super().memory(views, rows, gathered, dim) + tables * dim * 4


class SupCon(nn.Module):
    """The supervised contrastive loss of Khosla et al. 2020 (eq. 2, the sum outside the log), on the gathered batch.

    All views of all rows together are the multi-viewed batch I. For an anchor i, with A(i) the other points of I and
    P(i) those among them that have its class,

        L = mean_i (-1 / |P(i)|) sum_{p in P(i)} log [ e^(<z_i, z_p> / tau) / sum_{a in A(i)} e^(<z_i, z_a> / tau) ]

    over the anchors that have a positive. The class is the label; a sample of label -1 is a class of its own, so that
    without labels this is NT-Xent over k views (Chen et al. 2020). Two rows of one id in one view are the same point
    and not compared. The official code's factor tau / tau_base is left out, as in the paper.

    Cost for b of n rows: k (k + 1) / 2 b n d multiplications; memory O(k n d) and one tile. State: log tau, shape [1];
    the paper's tau is 0.1.
    """

    def __init__(self, config: SupConConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, list(views), collectives
        self.log_temperature = config.temperature.parameter()

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        scale = 1 / temperature
        denominators = self.denominators(local, gathered, scale)
        all_classes = classes(gathered.ids, gathered.labels)
        own_classes = all_classes[own_rows(local, self.collectives)]
        points = torch.stack([held(gathered, v) for v in self.views]).sum(dim=0)
        class_sums = sum_by_key(all_classes, points, own_classes)
        parts: dict[str, Tensor] = {}
        sums, anchor_counts = [], []
        for u in self.views:
            counts = self.positives(gathered, u, local.ids, own_classes, all_classes)
            all_counts = self.positives(gathered, u, gathered.ids, all_classes, all_classes)
            own = sum_by_key(gathered.ids, held(gathered, u), local.ids)
            mean = (class_sums - own) / counts.clamp_min(1)[:, None]
            losses = denominators[u] - scale * (local.z[u] * mean).sum(dim=1)
            sums.append(losses.masked_fill(~(local.present[u] & (counts > 0)), 0).sum())
            anchor_counts.append((gathered.present[u] & (all_counts > 0)).sum())
            parts[f"loss/{u}"] = BatchMean.over(anchor_counts[-1], local, gathered)(sums[-1].detach())
        parts["temperature"] = temperature[0].detach()
        mean = BatchMean.over(torch.stack(anchor_counts), local, gathered)
        return Losses(mean(torch.stack(sums)), parts)

    def denominators(
        self, local: Embeddings, gathered: Embeddings, scale: Float[Tensor, "1"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """For each anchor view, log-sum-exp over all other points of all views."""
        pairs, own = list(combinations(self.views, 2)), [(v, v) for v in self.views]
        sums = all_pairs(local, gathered, pairs, scale.expand(len(pairs)), self.collectives)
        sums |= all_pairs(local, gathered, own, scale.expand(len(own)), self.collectives, exclude_same_id=True)
        return {u: add_log_sums([sums[u, v].lse for v in self.views]) for u in self.views}

    def positives(
        self,
        gathered: Embeddings,
        u: str,
        ids: Int[Tensor, " b"],
        row_classes: Int[Tensor, " b"],
        all_classes: Int[Tensor, " n"],
    ) -> Int[Tensor, " b"]:
        """The number of positives of rows of view u with these ids and classes."""
        count = sum(count_by_key(all_classes, gathered.present[v], row_classes) for v in self.views)
        return count - count_by_key(gathered.ids, gathered.present[u], ids)


def held(table: Embeddings, v: str) -> Float[Tensor, "n d"]:
    """A view's rows; zeros where it is missing."""
    return table.z[v] * table.present[v].to(table.z[v].dtype)[:, None]

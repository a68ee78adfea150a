"""Dynamic bad pair mining: an objective over pairs, its anchors weighted by their history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import own_rows
from mvpretrain.distributed.sample_state import SampleState
from mvpretrain.objectives import ObjectiveConfig, registry
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.similarity.groups import Groups, group_mean
from mvpretrain.types import ChoosesGather, Embeddings, Losses, Objective, WeightsAnchors

PER_PAIR = ("infonce", "dcl", "one_vs_rest")


class DBPMConfig(ObjectiveConfig):
    """`objective`, one of infonce, dcl and one_vs_rest, with the pairs that look bad weighted down.

    A pair whose mean loss so far is `noisy` standard deviations below that of all pairs is suspiciously easy, one that
    is `faulty` above it is suspiciously hard. For the first `warmup` steps losses are recorded and nothing is weighted.
    `published: true` weights by the density of the normal distribution, as the authors' code does; it is above 1 where
    the standard deviation is below 0.4.
    """

    kind: Literal["dbpm"] = "dbpm"
    objective: Annotated[SerializeAsAny[ObjectiveConfig], registry]
    warmup: int = Field(default=1000, ge=0)
    noisy: float = Field(default=2.0, ge=0)
    faulty: float = Field(default=3.0, ge=0)
    published: bool = False
    device: bool = False

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"objective": {"kind": "infonce"}, "warmup": 1},
            {"objective": {"kind": "dcl"}, "warmup": 1, "noisy": 0.5, "faulty": 0.5, "published": True},
            {"objective": {"kind": "one_vs_rest"}, "warmup": 1, "noisy": 0.3, "faulty": 0.3},
        ]

    def takes(self, k: int) -> bool:
        return self.objective.takes(k)

    def check(self, views: Sequence[str]) -> None:
        if self.objective.kind not in PER_PAIR:
            raise ValueError(
                f"objective.objective is {self.objective.kind!r}, whose anchors dbpm cannot weigh; it can those of "
                f"{', '.join(PER_PAIR)}"
            )
        self.objective.check(views)

    def for_dim(self, dim: int) -> DBPMConfig:
        return self.model_copy(update={"objective": self.objective.for_dim(dim)})

    def build(self, views: Sequence[str], collectives: Collectives) -> DBPM:
        return DBPM(self, self.objective.build(views, collectives), collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        return self.objective.memory(views, rows, gathered, dim)


class DBPM(nn.Module):
    """The objective with each anchor's loss weighted by w_i, after Lan et al. 2024 (Dynamic Bad Pair Mining).

    With m_i the mean of an anchor's losses at its past visits, and mu and sigma the mean and standard deviation of m
    over all samples seen in that direction,

        w_i = e^(-(l_i - mu)^2 / (2 sigma^2))  where m_i < mu - noisy sigma or m_i > mu + faulty sigma, else 1

    is a constant to the gradient; l_i is the loss now. Rows of one id share their history, the mean of their losses.
    The authors keep every epoch's loss and weigh late epochs more; here each visit counts alike.

    State: by id and direction the number of visits and m; by direction their count, sum and sum of squares, and a step
    count. Messages a step beyond the objective's: the sum that reads the state, and four numbers an anchor and
    direction.
    """

    totals: Tensor
    steps: Tensor

    def __init__(self, config: DBPMConfig, objective: Objective, collectives: Collectives):
        super().__init__()
        assert isinstance(objective, WeightsAnchors), f"{type(objective).__name__} is none of {PER_PAIR}"
        self.config, self.objective, self.collectives = config, objective, collectives
        self.directions = list(objective.directions)
        objective.weight_anchors(self.weighted)
        self.store = SampleState(2 * len(self.directions), collectives, config.device)
        self.register_buffer("totals", torch.zeros(3, len(self.directions), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        # While the objective runs: the local rows' past means, and what `weighted` notes of each direction.
        self.history: Tensor | None = None
        self.noted: dict[tuple[str, str], Tensor] = {}

    def gathers(self, rows: int, dim: int) -> bool:
        """See `ChoosesGather`: as the objective has it."""
        return not isinstance(self.objective, ChoosesGather) or self.objective.gathers(rows, dim)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        like = next(iter(local.z.values())).detach()
        kept = self.store.read(gathered.ids, like.to(torch.promote_types(like.dtype, torch.float32)))
        self.history, self.noted = kept[own_rows(local, self.collectives)].view(len(local.ids), 2, -1)[:, 1], {}
        losses = self.objective(local, gathered)
        noted = torch.stack([self.noted[direction] for direction in self.directions], dim=2)  # b 4 w
        all_losses, valid, bad, weights = self.collectives.gather(noted).unbind(1)
        self.history, self.noted = None, {}
        if self.training:
            self.record(gathered.ids, kept, all_losses, valid > 0.5)
        number = valid.sum().clamp_min(1)
        parts = {"bad": (bad * valid).sum() / number, "weight": (weights * valid).sum() / number}
        return Losses(losses.total, losses.parts | parts)

    def weighted(
        self, direction: tuple[str, str], losses: Float[Tensor, " b"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The objective's `AnchorWeighting`: the losses of one direction's local rows, weighted."""
        w, loss = self.directions.index(direction), losses.detach()
        bad = self.suspicious(w) & valid
        mu, sigma = self.mean_and_deviation(w)
        weight = (-((loss - mu) ** 2) / (2 * sigma**2)).exp()
        if self.config.published:
            weight = weight / (sigma * math.sqrt(2 * math.pi))
        weight = torch.where(bad, weight.to(loss), torch.ones_like(loss))
        self.noted[direction] = torch.stack([loss, valid.to(loss), bad.to(loss), weight], dim=1)
        return losses * weight

    def suspicious(self, w: int) -> Bool[Tensor, " b"]:
        """The local rows whose history is far from the others'."""
        assert self.history is not None
        mu, sigma = self.mean_and_deviation(w)
        mean = self.history[:, w]  # NaN where there is none, which is neither below nor above
        far = (mean < mu - self.config.noisy * sigma) | (mean > mu + self.config.faulty * sigma)
        return far & (self.steps >= self.config.warmup)

    def mean_and_deviation(self, w: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean and standard deviation of m over all samples; the latter at least 1e-6."""
        count, total, squares = self.totals[:, w]
        mu = total / count.clamp_min(1)
        return mu, (squares / count.clamp_min(1) - mu**2).clamp_min(0).sqrt().clamp_min(1e-6)

    @torch.no_grad()
    def record(
        self,
        ids: Int[Tensor, " n"],
        kept: Float[Tensor, "n c"],
        losses: Float[Tensor, "n w"],
        valid: Bool[Tensor, "n w"],
    ) -> None:
        """Take a batch into the history of the gathered ids and into the totals, by the same numbers on every rank."""
        self.steps += 1
        visits, mean = kept.nan_to_num(nan=0.0).view(len(ids), 2, -1).unbind(1)
        groups = Groups.by(ids)
        columns = [group_mean(groups, losses[:, w, None], valid[:, w, None]) for w in range(len(self.directions))]
        loss = torch.stack(columns, dim=1)
        seen, known = ~loss.isnan(), visits > 0
        new = torch.where(seen, mean + (loss.nan_to_num(nan=0.0) - mean) / (visits + 1), mean)
        group, index = groups.group_of_row, torch.arange(len(ids), device=ids.device)
        once = torch.zeros_like(group).scatter_(0, group, index)[group] == index  # one row of each id
        after = torch.stack([(known | seen).double(), new.double(), new.double() ** 2])
        before = torch.stack([known.double(), mean.double(), mean.double() ** 2])
        self.totals += ((after - before) * once[None, :, None]).sum(dim=1).to(self.totals)
        changed = seen.any(dim=1)
        rows = torch.stack([visits + seen.to(visits), new], dim=1).flatten(1)
        self.store.write(ids[changed], rows[changed])

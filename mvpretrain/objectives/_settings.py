"""Settings that several objectives share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mvpretrain.config import Config, unknown
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._moving_average import AverageSettings, Gamma
from mvpretrain.objectives._temperature import bounded_exp
from mvpretrain.similarity.per_anchor import GradientMode


def pairs_of(asked: str | Sequence[tuple[str, str]], views: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of views that `pairs` asks for: `all`, a view name (that view against each other one), or a list.

    ValueError: a view that is not among `views`, or that is paired with itself; no pair at all.
    """
    if asked == "all":
        return list(combinations(views, 2))
    pairs = [(asked, v) for v in views if v != asked] if isinstance(asked, str) else list(asked)
    for v in {v for pair in pairs for v in pair}:
        if v not in views:
            raise ValueError(unknown("view in objective.pairs", v, views))
    for u, v in pairs:
        if u == v:
            raise ValueError(f"objective.pairs names {u!r} against itself; a pair is two different views")
    if not pairs:
        raise ValueError("objective.pairs is empty; write all, a view's name, or a list of pairs")
    return pairs


def pair_count(asked: str | Sequence[tuple[str, str]], views: int) -> int:
    """How many pairs `pairs_of` gives for so many views."""
    if isinstance(asked, str):
        return views * (views - 1) // 2 if asked == "all" else views - 1
    return len(asked)


def agreed_dim(asked: int | None, dim: int) -> int:
    """The width of an objective's networks, for tables of width `dim`. ValueError: its settings ask for another one."""
    if asked not in (None, dim):
        raise ValueError(f"objective.dim is {asked}, and embeddings have dim={dim}; remove objective.dim")
    return dim


class MovingAverageConfig(ObjectiveConfig):
    """What objectives against the whole data set have in common: moving averages kept for each sample.

    `pairs` as infonce has them. `gamma` is a batch's weight in the averages. `in_view: true` is for two augmentations
    of one image: negatives are the other samples of both views, and a sample has one average for the pair. `eps` is a
    margin more than a guard: an anchor whose negatives together are below it stops counting. `gradient: scalars` sends
    numbers instead of gradients of rows between ranks, at the same result. `device: true` keeps the averages on the
    GPU. `published: true` does as the authors' code does where that is not the paper; each kind says in what.
    """

    pairs: str | tuple[tuple[str, str], ...] = "all"
    gamma: Gamma = Gamma()
    eps: float = Field(default=1e-14, ge=0, lt=1)
    in_view: bool = False
    gradient: GradientMode = "scalars"
    device: bool = False
    published: bool = False

    def differentiable(self) -> bool:
        return not self.published

    def check(self, views: Sequence[str]) -> None:
        pairs_of(self.pairs, views)

    def settings(self, views: Sequence[str]) -> AverageSettings:
        """How the averages are taken, over these views."""
        return AverageSettings(
            pairs_of(self.pairs, views), self.gamma, self.eps, self.in_view, self.gradient, self.device
        )

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        # The anchors' means of candidates, gradients of all views, and two scaled tables of one view.
        directions = (4 if self.in_view else 2) * pair_count(self.pairs, views)
        return super().memory(views, rows, gathered, dim) + ((directions + 2 * views) * rows + 2 * gathered) * dim * 4


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

    def refuse_per_pair(self, reason: str) -> None:
        """ValueError where temperatures for pairs are asked of an objective that has one."""
        if self.per_pair:
            raise ValueError(f"objective.temperature.per_pair is true, but {reason}; remove per_pair")

    def parameter(self, count: int = 1) -> nn.Parameter:
        """The logarithms to learn, shape [count]."""
        return nn.Parameter(torch.full((count,), self.init).log(), requires_grad=self.learnable)

    def bounded(self, log_temperature: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The temperatures, within [min, max]."""
        return bounded_exp(log_temperature, self.min, self.max)

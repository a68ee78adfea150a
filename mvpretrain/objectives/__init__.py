"""The door to objectives: two tables in, `Losses` out. One file a kind; see the README for how to add one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from mvpretrain.config import Config, Door, Foreign, Kind, call_foreign, unknown
from mvpretrain.exchange import Alone, Exchange
from mvpretrain.numerics.bounded import bounded_exp
from mvpretrain.types import Objective


class ObjectiveConfig(Kind):
    """Settings of an objective."""

    def check(self, views: Sequence[str]) -> None:
        """ValueError where the objective asks for a view that is not among `views`."""

    def build(self, views: Sequence[str], exchange: Exchange) -> Objective:
        """The objective over these views; `exchange` is for those that must tell ranks more than the table."""
        raise TypeError(f"{type(self).__name__} must define build")

    def memory(self, views: int, rows: int, every: int, dim: int) -> int:
        """Bytes that one rank holds at the peak of loss and gradient, beyond its own embeddings."""
        table = every * dim * views * 4
        return 3 * table  # the gathered table, its gradient, and the packed copy


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


def anchors(asked: str | None, views: Sequence[str]) -> list[str]:
    """The views that are exchanged between whole tuples in turn: the one asked for, `all`, or the first.

    ValueError: no such view.
    """
    if asked is not None and asked not in (*views, "all"):
        raise ValueError(unknown("view in objective.anchor", asked, [*views, "all"]))
    return list(views) if asked == "all" else [asked or views[0]]


class ForeignObjective(ObjectiveConfig, Foreign):
    """A user's own class, `forward(local, every) -> Losses`, by import path."""

    def build(self, views: Sequence[str], exchange: Exchange) -> Objective:
        return call_foreign(self, views=views, exchange=exchange)


door = Door("mvpretrain.objectives", ObjectiveConfig, ForeignObjective, "objective")


def build(
    config: dict[str, Any] | ObjectiveConfig, views: Sequence[str], exchange: Exchange | None = None
) -> Objective:
    """An objective from settings as a recipe writes them, for use in any training code.

    `views` are the keys of the tables it will be given. ValueError: unknown kind or key, or a view that is not there.
    """
    parsed = door.parse(config)
    parsed.check(views)
    return parsed.build(views, exchange or Alone())

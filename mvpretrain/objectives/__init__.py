"""The registry of objectives: two tables of embeddings in, `Losses` out. One file a kind.

What an objective is, and which optional methods others ask of it, is in `mvpretrain.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mvpretrain.distributed.collectives import Collectives, SingleProcess
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.registry import External, Kind, Registry, build_external
from mvpretrain.types import Objective

__all__ = ["ExternalObjective", "ObjectiveConfig", "any_rows", "build", "registry"]


class ObjectiveConfig(Kind):
    """Settings of an objective; a kind defines `build`, and the other methods where their answers do not fit it."""

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """The smallest complete settings and their variants, without `kind`, for views named view0, view1, ...

        `mvpretrain.testing.check_objective` holds each to the laws, and refuses a kind that gives none.
        """
        return []

    def takes(self, k: int) -> bool:
        """Whether the objective compares this number of views."""
        return k >= 2

    def differentiable(self) -> bool:
        """Whether the gradient of a new objective's first step is the whole derivative of its value.

        It is not where something that depends on the rows is a constant to the gradient on purpose.
        """
        return True

    def check(self, views: Sequence[str]) -> None:
        """ValueError where the objective asks for a view that is not among `views`."""

    def projection_heads(self) -> int:
        """The number of heads that every tower's rows must consist of, each as wide as a recipe's `dim`."""
        return 1

    def for_dim(self, dim: int) -> ObjectiveConfig:
        """These settings for tables of this width, which networks must know. ValueError: it does not fit."""
        return self

    def build(self, views: Sequence[str], collectives: Collectives) -> Objective:
        """The objective over these views; `collectives` is for those that send more than the gathered table."""
        raise TypeError(f"{type(self).__name__} must define build")

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        """Bytes that one rank holds at the peak of loss and gradient, beyond its own embeddings.

        For so many views, rows of a rank and gathered rows, and numbers a row.
        """
        table = gathered * dim * views * 4
        return 3 * table  # the gathered table, its gradient, and the packed copy


class ExternalObjective(ObjectiveConfig, External):
    """A user's own class, `forward(local, gathered) -> Losses`, by import path."""

    context: ClassVar[tuple[str, ...]] = ("views", "collectives")

    def takes(self, k: int) -> bool:
        own = self.method("takes")
        return super().takes(k) if own is None else own(k)

    def differentiable(self) -> bool:
        own = self.method("differentiable")
        return super().differentiable() if own is None else own()

    def build(self, views: Sequence[str], collectives: Collectives) -> Objective:
        return build_external(self, views=views, collectives=collectives)


registry = Registry("mvpretrain.objectives", ObjectiveConfig, ExternalObjective, "objective")


def build(
    config: dict[str, Any] | ObjectiveConfig,
    views: Sequence[str],
    collectives: Collectives | None = None,
    dim: int | None = None,
) -> Objective:
    """An objective from settings as a recipe writes them, for use in any training code.

    `views` are the keys of the tables it will be given, and `dim` is their width, all heads together, which a few kinds
    must know (amcl). ValueError: unknown kind or key, a view that is not there, a width that is needed or does not fit.
    """
    parsed = registry.parse(config)
    parsed.check(views)
    sized = parsed if dim is None else parsed.for_dim(dim)
    return sized.build(views, collectives or SingleProcess())

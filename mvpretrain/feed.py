"""From a recipe to its batches: sources, transforms and the stream over them."""

from __future__ import annotations

from typing import Literal

import torch

from mvpretrain.recipe import Recipe
from mvpretrain.shards.stream import Source, Stream
from mvpretrain.shards.synthetic import SyntheticConfig
from mvpretrain.shards.tars import Tars
from mvpretrain.types import Transform

Split = Literal["train", "eval"]


def sources(recipe: Recipe, split: Split) -> list[Source]:
    """The opened sources of a split; [] where the recipe names no `data.eval`.

    ValueError: shards that are not there, a field that no sample has, repeated keys.
    """
    if isinstance(recipe.data, SyntheticConfig):
        sketches = {view.fields[0]: view.sketch for view in recipe.views.values()}
        return list(recipe.data.build(sketches, train=split == "train"))
    wanted = {name: (view.field, view.missing) for name, view in recipe.views.items()}
    return list(recipe.data.build(wanted, train=split == "train"))


def samples(stream: Stream) -> int:
    """The samples of an epoch."""
    return int(sum(source.counts.sum() for source in stream.sources))


def damages(stream: Stream) -> list[str]:
    """What is wrong with the tars as a whole: those that break off are used up to there, however much is missing."""
    return [f"{p.url}: {p.reason}" for s in stream.sources if isinstance(s, Tars) for p in s.index.problems]


def transforms(recipe: Recipe, augmented: bool) -> dict[str, tuple[tuple[str, ...], Transform]]:
    """Each view's field alternatives and its transform."""
    return {name: (view.fields, view.build(augmented)) for name, view in recipe.views.items()}


def stream(recipe: Recipe, split: Split, rank: int, size: int) -> Stream | None:
    """The batches of a split for one rank; None where it has none. Training batches are augmented."""
    found = sources(recipe, split)
    if not found:
        return None
    views = transforms(recipe, augmented=split == "train")
    pin = recipe.engine.device != "cpu" and torch.cuda.is_available()
    return Stream(found, views, recipe.batch, recipe.seed, recipe.loader, rank, size, pin)

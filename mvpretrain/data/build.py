"""From settings to batches: sources, transforms and the stream over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mvpretrain.data.loader import Source, Stream, StreamConfig
from mvpretrain.data.sources.shards import ShardsConfig, Tars
from mvpretrain.data.sources.synthetic import SyntheticConfig
from mvpretrain.types import Transform
from mvpretrain.views import ViewConfig

Split = Literal["train", "eval"]


def open_sources(data: ShardsConfig | SyntheticConfig, views: Mapping[str, ViewConfig], split: Split) -> list[Source]:
    """The opened sources of a split; [] where the settings name no `eval`.

    ValueError: shards that are not there, a field that no sample has, repeated keys.
    """
    if isinstance(data, SyntheticConfig):
        return list(data.build({view.fields[0]: view.sketch for view in views.values()}, train=split == "train"))
    wanted = {name: (view.field, view.missing) for name, view in views.items()}
    return list(data.build(wanted, train=split == "train"))


def count_samples(stream: Stream) -> int:
    """The samples of an epoch."""
    return int(sum(source.counts.sum() for source in stream.sources))


def describe_damages(stream: Stream) -> list[str]:
    """What is wrong with the tars as a whole: those that break off are used up to there, however much is missing."""
    return [f"{p.url}: {p.reason}" for s in stream.sources if isinstance(s, Tars) for p in s.index.problems]


def build_transforms(views: Mapping[str, ViewConfig], augmented: bool) -> dict[str, tuple[tuple[str, ...], Transform]]:
    """Each view's field alternatives and its transform."""
    return {name: (view.fields, view.build(augmented)) for name, view in views.items()}


def build_stream(
    data: ShardsConfig | SyntheticConfig,
    views: Mapping[str, ViewConfig],
    split: Split,
    batch: int,
    seed: int,
    loader: StreamConfig,
    rank: int = 0,
    size: int = 1,
    pin: bool = False,
) -> Stream | None:
    """The batches of a split for one rank; None where it has none. Training batches are augmented.

    ValueError: as for `open_sources` and `Stream`.
    """
    found = open_sources(data, views, split)
    if not found:
        return None
    return Stream(found, build_transforms(views, split == "train"), batch, seed, loader, rank, size, pin)

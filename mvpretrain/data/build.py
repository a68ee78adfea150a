"""From settings to batches: sources, transforms and the stream over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from mvpretrain.data.dataset import Transforms
from mvpretrain.data.loader import Stream, StreamConfig
from mvpretrain.data.sources import SourceConfig
from mvpretrain.types import ReportsDamages, Source
from mvpretrain.views import ViewConfig

Split = Literal["train", "eval"]


def count_samples(sources: Iterable[Source]) -> int:
    """The samples of an epoch."""
    return sum(int(source.counts.sum()) for source in sources)


def describe_damages(sources: Iterable[Source]) -> list[str]:
    """What is wrong with the data of some sources as a whole, however few samples are missing for it."""
    return [damage for source in sources if isinstance(source, ReportsDamages) for damage in source.damages()]


def build_transforms(views: Mapping[str, ViewConfig], augmented: bool) -> Transforms:
    """Each view's field alternatives and its transform."""
    return {name: (view.fields, view.build(augmented)) for name, view in views.items()}


def build_stream(
    data: SourceConfig,
    views: Mapping[str, ViewConfig],
    split: Split,
    batch: int,
    seed: int,
    loader: StreamConfig,
    rank: int = 0,
    size: int = 1,
    pin: bool = False,
    transforms: Transforms | None = None,
) -> Stream | None:
    """The batches of a split for one rank; None where it has none.

    Batches hold the views of `transforms`: by default all, augmented where they are for training. ValueError: samples
    that are not there, or what `Stream` refuses.
    """
    sources = data.build(views, split == "train")
    if not sources:
        return None
    if transforms is None:
        transforms = build_transforms(views, split == "train")
    return Stream(sources, transforms, batch, seed, loader, rank, size, pin)

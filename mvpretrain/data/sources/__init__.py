"""The registry of data sources: settings to samples that can be read in any order. One file a kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mvpretrain.registry import External, Kind, Registry, build_external, import_path
from mvpretrain.types import Source
from mvpretrain.views import ViewConfig


class SourceConfig(Kind):
    """Settings of a run's samples."""

    @property
    def labelled(self) -> bool:
        """Whether samples may have a class index."""
        return True

    def build(self, views: Mapping[str, ViewConfig], train: bool) -> Sequence[Source]:
        """The sources of the training samples, or of the held-out ones ([] where there are none), opened.

        `views` say which fields are read, and what may be missing. ValueError: samples that are not there, or that lack
        a field.
        """
        raise TypeError(f"{type(self).__name__} must define build")


class ExternalSource(SourceConfig, External):
    """A user's own source by import path (see `types.Source`).

    The class is called with `train` (False for the held-out samples) and `views` where its constructor names them. One
    that does not name `train`, or has no samples under train=False, has no held-out samples.
    """

    context: ClassVar[tuple[str, ...]] = ("train", "views")

    def build(self, views: Mapping[str, ViewConfig], train: bool) -> Sequence[Source]:
        if not train and "train" not in inspect.signature(import_path(self.kind, registry.noun)).parameters:
            return []
        source = build_external(self, train=train, views=views)
        if not isinstance(source, Source):
            lacking = [name for name in ("name", "weight", "counts", "ids", "read") if not hasattr(source, name)]
            known = f"{registry.noun} kind {self.kind!r}"
            raise ValueError(f"{known} lacks {', '.join(lacking)}; mvpretrain.types.Source says what it needs")
        return [source] if source.counts.sum() else []


registry = Registry("mvpretrain.data.sources", SourceConfig, ExternalSource, "data source")

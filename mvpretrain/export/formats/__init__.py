"""The registry of export formats: trained encoders in, files that some library reads out. One file a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from mvpretrain.model.tower import Tower
from mvpretrain.registry import External, Kind, Registry, build_external
from mvpretrain.views import ViewConfig


class Trained(NamedTuple):
    """One view of a trained run."""

    view: ViewConfig
    tower: Tower  # in evaluation mode, on the CPU
    dim: int  # of an embedding, all heads side by side


@runtime_checkable
class Format(Protocol):
    """Writes trained views, and embeds with what it wrote."""

    def write(self, folder: Path, trained: Mapping[str, Trained]) -> None:
        """Write the views, by name, into an empty folder. ValueError: a view or tower that the format cannot hold."""
        ...

    def embed(self, folder: Path, view: str, values: Sequence[Any]) -> Tensor:
        """The unit rows `n d` of raw values of a view by the written files alone, read as their users read them.

        A value is what the view's field holds, or an item of the view where its kind cannot be drawn. The rows are
        compared with the run's.
        """
        ...

    def usage(self, name: str, view: str) -> str:
        """Python that loads `view` of the export called `name`, and a sentence on what to do with it, for the card."""
        ...


class FormatConfig(Kind):
    """Settings of a format. `tolerance` is the largest difference of a coordinate from the run's that is right."""

    tolerance: ClassVar[float] = 1e-5

    def build(self) -> Format:
        """The format. ValueError: a library that it needs is not installed."""
        raise TypeError(f"{type(self).__name__} must define build")


class ExternalFormat(FormatConfig, External):
    """A user's own class with `write`, `embed` and `usage`, by import path."""

    def build(self) -> Format:
        found = build_external(self)
        if not isinstance(found, Format):
            lacking = [name for name in ("write", "embed", "usage") if not callable(getattr(found, name, None))]
            raise ValueError(f"export format {self.kind!r} has no {', '.join(lacking)}; see mvpretrain.export.formats")
        return found


registry = Registry("mvpretrain.export.formats", FormatConfig, ExternalFormat, "export format")

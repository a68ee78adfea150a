"""The registry of encoders: a `View` in, one vector a sample out. One file a kind."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mvpretrain.registry import External, Kind, Registry, build_external
from mvpretrain.types import View


class EncoderConfig(Kind):
    """Settings of an encoder.

    `build` gives a module with `forward(view) -> b dim` and an attribute `dim`. A module may also have the hook
    `RecomputesActivations` of `mvpretrain.types`, and `blocks`, its repeated parts, input side first, of which a frozen
    tower can train the last `train_blocks`.
    """

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Settings of the smallest complete encoder and its variants, without `kind`.

        `mvpretrain.testing.check_encoder` holds each to the laws, and refuses a kind that gives none.
        """
        return []

    def example_view(self, rows: int) -> View:
        """Random items that this encoder takes, by torch's generator, with a mask of ones where lengths may vary."""
        raise ValueError(f"encoder kind {self.kind!r} has no example_view(rows) that gives a View of items it takes")

    def build(self) -> nn.Module:
        raise TypeError(f"{type(self).__name__} must define build")

    def portable(self, encoder: nn.Module) -> EncoderConfig:
        """Settings that build the same architecture with no file but the exported weights."""
        return self


class ExternalEncoder(EncoderConfig, External):
    """A user's own module, `forward(view) -> b dim` with an attribute `dim`, by import path."""

    def example_view(self, rows: int) -> View:
        own = self.method("example_view")  # a method of the module, whose settings it needs
        return super().example_view(rows) if own is None else own(self.build(), rows)

    def build(self) -> nn.Module:
        return build_external(self)


registry = Registry("mvpretrain.encoders", EncoderConfig, ExternalEncoder, "encoder")


def build(config: dict[str, Any] | EncoderConfig) -> nn.Module:
    """An encoder from settings as a recipe writes them. ValueError: unknown kind, key or model."""
    return registry.parse(config).build()


def local_file(path: str, wanted_by: str) -> Path:
    """The path of a weights file or model folder. ValueError where there is none: nothing is ever downloaded."""
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"{wanted_by}: {path!r} is no file or folder here; download it first and give its path")
    return found


def unknown_model(library: str, name: str, known: Sequence[str]) -> str:
    """One clause that refuses a model's name and offers the nearest of a list too long to show."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return f"unknown {library} model {name!r}; {hint}{library}.list_models() has all {len(known)}"


def check_items(data: Tensor, shape: Sequence[int | None], encoder: str, remedy: str) -> None:
    """ValueError unless `data` is `b *shape`; None in `shape` stands for any length."""
    item = tuple(data.shape[1:])
    if len(item) != len(shape) or any(want not in (None, got) for want, got in zip(shape, item)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{encoder} encoder takes items of shape ({wanted}), got {item}; {remedy}")

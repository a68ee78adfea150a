"""The registry of views: one raw field of a sample to one item of fixed shape. One file a kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mvpretrain.registry import External, Kind, Registry, build_external
from mvpretrain.types import Transform, View


class ViewConfig(Kind):
    """Settings of a view.

    `field` is the file ending in the shard, with alternatives: "jpg;png". `tower` names the tower that encodes it
    (default: the view's own name; views may share one). `missing` says how much of it may be missing: `some` (single
    samples may lack it, a whole shard may not), `any`, `none` (refuse at the start), or `drop` (samples without it are
    left out of the epoch).
    """

    field: str
    tower: str | None = None
    missing: Literal["some", "any", "none", "drop"] = "some"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Small complete settings and their variants, without `kind`.

        `mvpretrain.testing.check_view` holds each to the laws, and refuses a kind that gives none.
        """
        return []

    @property
    def fields(self) -> tuple[str, ...]:
        """The alternatives in `field`, the preferred one first."""
        return tuple(self.field.split(";"))

    def build(self, train: bool) -> Transform:
        """The transform; with `train`, augmentations draw from torch's global generator, which the stream seeds."""
        raise TypeError(f"{type(self).__name__} must define build")

    def sketch(self, latent: np.ndarray) -> Any:
        """A raw field value that shows a latent vector, for the synthetic source."""
        raise ValueError(f"view kind {self.kind!r} cannot be drawn synthetically; use one that can, or real shards")

    def portable(self, folder: Path) -> ViewConfig:
        """Settings that need no file outside `folder`; files that they need are copied there."""
        return self


class ExternalView(ViewConfig, External):
    """A user's own transform, `__call__(raw) -> View` and `blank() -> View`, by import path."""

    context: ClassVar[tuple[str, ...]] = ("train",)

    def sketch(self, latent: np.ndarray) -> Any:
        own = self.method("sketch")
        return super().sketch(latent) if own is None else own(latent)

    def build(self, train: bool) -> Transform:
        return build_external(self, train=train)


registry = Registry("mvpretrain.views", ViewConfig, ExternalView, "view")


def piece(values: Tensor, length: int, train: bool) -> View:
    """`n ...` to `length ...`: a random piece of what is longer (in evaluation its start), zeros after what is shorter.

    The mask is True on the values, False on the zeros.
    """
    surplus = len(values) - length
    start = int(torch.randint(surplus + 1, ())) if train and surplus > 0 else 0
    found = values[start : start + length]
    mask = torch.arange(length) < len(found)
    return View(torch.cat([found, found.new_zeros(length - len(found), *found.shape[1:])]), mask)


def mixing(rows: int, latent: np.ndarray) -> np.ndarray:
    """A fixed random linear map of a latent vector to `rows` numbers of about its size, for `sketch`."""
    weight = np.random.default_rng(20260101).standard_normal((rows, len(latent)))
    return weight @ latent / len(latent) ** 0.5

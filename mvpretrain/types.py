"""What travels between the parts: named tuples of tensors, and the two protocols that the registries build."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class View(NamedTuple):
    """One view of b samples; without the leading b it is one item of one sample."""

    data: Tensor  # b *item
    mask: Tensor | None = None  # b length, True where there is data (views of variable length)

    def to(self, device: torch.device) -> View:
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return View(self.data.to(device, non_blocking=True), mask)


class Sample(NamedTuple):
    """One sample as a source hands it out: undecoded fields by name."""

    id: int  # 64-bit, stable over epochs, restarts and shard order
    key: str
    fields: dict[str, Any]
    label: int = -1  # class index where the data set has one


class Batch(NamedTuple):
    """The rows of one rank. A row whose `present` is False in a view holds filler there and counts nowhere."""

    views: dict[str, View]
    ids: Tensor  # b, int64; equal ids are views of the same thing
    present: dict[str, Tensor]  # b, bool
    labels: Tensor  # b, int64, -1 where unknown

    def to(self, device: torch.device) -> Batch:
        return Batch(
            {v: view.to(device) for v, view in self.views.items()},
            self.ids.to(device, non_blocking=True),
            {v: p.to(device, non_blocking=True) for v, p in self.present.items()},
            self.labels.to(device, non_blocking=True),
        )


class Embeddings(NamedTuple):
    """The table that objectives read: one row a sample, the columns by view."""

    z: dict[str, Tensor]  # b d, unit rows, float32
    ids: Tensor
    present: dict[str, Tensor]
    labels: Tensor


class Losses(NamedTuple):
    total: Tensor  # scalar, to differentiate
    parts: dict[str, Tensor]  # detached scalars to log


@runtime_checkable
class Encoder(Protocol):
    """A view in, one vector a sample out: `b dim`."""

    dim: int

    def __call__(self, view: View) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """This rank's rows against the rows of every rank.

    Both tables have `present` masks; every rank's table has the same number of rows (short ones are padded with absent
    rows), so that `len(gathered) / len(local)` is the number of parts. Returned is the mean over the local rows in
    units of the global mean, or the whole batch's value: the average over ranks is then the value on one rank.
    """

    def __call__(self, local: Embeddings, gathered: Embeddings) -> Losses: ...


@runtime_checkable
class Transform(Protocol):
    """What a view's config builds: a raw field to one item, always of the same shape."""

    def __call__(self, raw: Any) -> View: ...

    def blank(self) -> View:
        """An item that any encoder maps to finite numbers, for samples without this view."""
        ...

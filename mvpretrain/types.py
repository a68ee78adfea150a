"""What travels between the parts: named tuples of tensors with their row algebra, and the protocols of the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate

T = TypeVar("T")


def map_tensors(change: Callable[..., Tensor], first: T, *others: T) -> T:
    """A structure like `first`, in which each tensor is `change` of the corresponding tensors of all structures.

    Structures are tensors, None, and dicts and named tuples of structures; the others have at least the keys of
    `first`, and a tensor where `first` has one.
    """
    structures: tuple[Any, ...] = (first, *others)
    if isinstance(first, Tensor):
        return cast(T, change(*structures))
    if isinstance(first, dict):
        return cast(T, {key: map_tensors(change, *(s[key] for s in structures)) for key in first})
    if isinstance(first, tuple):
        return type(first)(*(map_tensors(change, *fields) for fields in zip(*structures, strict=True)))
    assert first is None, type(first)
    return first


def _concatenated(parts: Sequence[T]) -> T:
    """Parts one below the other; one alone is returned as it is."""
    return parts[0] if len(parts) == 1 else map_tensors(lambda *tensors: torch.cat(tensors), *parts)


class View(NamedTuple):
    """One view of b samples; without the leading b it is one item of one sample."""

    data: Tensor  # b *item
    mask: Tensor | None = None  # b length, True where there is data (views of variable length)

    @staticmethod
    def stack(items: Sequence[View]) -> View:
        """Items of one shape as a view of as many rows; a loader's worker stacks into memory that it shares."""
        return map_tensors(lambda *tensors: default_collate(list(tensors)), *items)

    @staticmethod
    def cat(views: Sequence[View]) -> View:
        """Views of one shape as one view of more rows."""
        return _concatenated(views)

    def rows(self, rows: slice | Tensor) -> View:
        """Some rows; a slice is in the same memory."""
        return map_tensors(lambda x: x[rows], self)

    def shorten(self, length: int) -> View:
        """The first `length` positions of every row, in the same memory."""
        return map_tensors(lambda x: x[:, :length], self)

    def to(self, device: torch.device) -> View:
        return map_tensors(lambda x: x.to(device, non_blocking=True), self)


class Sample(NamedTuple):
    """One sample as a source hands it out: undecoded fields by name."""

    id: int  # 64-bit, stable over epochs, restarts and shard order
    key: str
    fields: dict[str, Any]
    label: int = -1  # class index where the data set has one


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason under which it is counted."""


class Batch(NamedTuple):
    """The rows of one rank. A row whose `present` is False in a view holds filler there and counts nowhere."""

    views: dict[str, View]
    ids: Tensor  # b, int64; equal ids are views of the same thing
    present: dict[str, Tensor]  # b, bool
    labels: Tensor  # b, int64, -1 where unknown

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Batches of the same views one below the other."""
        return _concatenated(batches)

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some rows; a slice is in the same memory."""
        return map_tensors(lambda x: x[rows], self)

    def to(self, device: torch.device) -> Batch:
        return map_tensors(lambda x: x.to(device, non_blocking=True), self)


class Embeddings(NamedTuple):
    """The table that objectives read: one row a sample, the columns by view."""

    z: dict[str, Tensor]  # b d, unit rows, float32
    ids: Tensor
    present: dict[str, Tensor]
    labels: Tensor

    @staticmethod
    def cat(tables: Sequence[Embeddings]) -> Embeddings:
        """Tables one below the other; the first one says which views the result has."""
        return _concatenated(tables)

    def rows(self, rows: slice | Tensor) -> Embeddings:
        """Some rows; a slice is in the same memory."""
        return map_tensors(lambda x: x[rows], self)

    def split(self, parts: int) -> list[Embeddings]:
        """The table as so many tables of equally many rows, in the same memory."""
        assert len(self.ids) % parts == 0, (len(self.ids), parts)
        z, present = ({v: x.chunk(parts) for v, x in columns.items()} for columns in (self.z, self.present))
        rest = zip(self.ids.chunk(parts), self.labels.chunk(parts), strict=True)
        return [
            Embeddings({v: x[i] for v, x in z.items()}, ids, {v: p[i] for v, p in present.items()}, labels)
            for i, (ids, labels) in enumerate(rest)
        ]

    def pad(self, rows: int) -> Embeddings:
        """The table with absent rows appended up to `rows`: their z is zero, their ids and labels are -1."""
        more = rows - len(self.ids)
        assert more >= 0, (len(self.ids), rows)
        if more == 0:
            return self
        return Embeddings(
            z={v: pad(z, (0, 0, 0, more)) for v, z in self.z.items()},
            present={v: pad(p, (0, more), value=False) for v, p in self.present.items()},
            ids=pad(self.ids, (0, more), value=-1),
            labels=pad(self.labels, (0, more), value=-1),
        )


class Losses(NamedTuple):
    total: Tensor  # scalar, to differentiate
    parts: dict[str, Tensor]  # detached scalars to log


@runtime_checkable
class Source(Protocol):
    """Samples that can be read in any order, in any process: forked or, pickled, spawned ones read them."""

    name: str
    weight: float  # its share of the draws where there are several sources is weight / sum of weights
    counts: np.ndarray  # samples of each shard, int64; shards are shuffled as wholes, their samples in windows

    @property
    def ids(self) -> np.ndarray: ...  # int64, one a sample

    def read(self, i: int) -> Sample:
        """Sample i of sum(counts). BadSample: it cannot be had, and why."""
        ...


@runtime_checkable
class ReportsDamages(Protocol):
    """A source that says what is wrong with its data as a whole, though samples can be read from it. Optional."""

    def damages(self) -> list[str]:
        """One sentence for each damage, which a run prints as it starts; [] where there is none."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A view in, one vector a sample out: `b dim`."""

    dim: int

    def __call__(self, view: View) -> Tensor: ...


@runtime_checkable
class RecomputesActivations(Protocol):
    """An encoder that trades time for memory if its tower has `checkpoint_activations: true`. Optional."""

    def checkpoint_activations(self) -> None:
        """From now on keep the inputs of blocks only, and compute the rest again in backward.

        Names in the state dict stay as they are. ValueError: this very model cannot.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """This rank's rows against the rows of every rank.

    Both tables have `present` masks; every rank's table has the same number of rows (short ones are padded with absent
    rows), so that `len(gathered.ids) / len(local.ids)` is the number of ranks. Returned is the sum over the local rows
    divided by the number of rows that count on the average rank (`distributed.gather.BatchMean`), or the whole batch's
    value: the average over ranks is then the value on one rank.

    Optional: `ChoosesGather`, `WeightsAnchors`, `SampleTemperatures`.
    """

    def __call__(self, local: Embeddings, gathered: Embeddings) -> Losses: ...


@runtime_checkable
class Transform(Protocol):
    """What a view's config builds: a raw field to one item, always of the same shape."""

    def __call__(self, raw: Any) -> View: ...

    def blank(self) -> View:
        """An item that any encoder maps to finite numbers, for samples without this view."""
        ...


@runtime_checkable
class ChoosesGather(Protocol):
    """An objective that can do without the gathered rows."""

    def gathers(self, rows: int, dim: int) -> bool:
        """Whether it wants the rows of every rank, with `rows` of width `dim` a rank; else its gathered table comes
        without z.
        """
        ...


@runtime_checkable
class AnchorWeighting(Protocol):
    """What is done to the losses of an objective's anchors before their mean is taken."""

    def __call__(self, direction: tuple[str, str], losses: Tensor, valid: Tensor) -> Tensor:
        """The weighted losses (`b`) of the local rows of one direction (anchors' view, candidates' view); of the result
        only rows that are valid (`b`, bool) are used.
        """
        ...


@runtime_checkable
class WeightsAnchors(Protocol):
    """An objective over pairs of views whose anchors can be weighted."""

    directions: Sequence[tuple[str, str]]  # every (anchors' view, candidates' view), in a fixed order

    def weight_anchors(self, weighting: AnchorWeighting) -> None:
        """From now on, let `weighting` change the losses of each direction."""
        ...


@runtime_checkable
class SampleTemperatures(Protocol):
    """An objective that keeps temperatures by sample id."""

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """(ids that this rank keeps, their temperatures, the mean over directions); empty where all have one."""
        ...

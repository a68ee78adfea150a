"""Batches from draws: read, decode, augment, stack. This is what a loader's worker does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from mvpretrain.types import BadSample, Batch, Source, Transform, View


class Draw(NamedTuple):
    """One row of a batch before it is read."""

    source: int  # -1: filler
    position: int  # in the source's order; seeds the augmentation
    sample: int


class Row(NamedTuple):
    """One row of a batch; without a view where the sample lacks it."""

    views: dict[str, View]
    id: int = -1
    label: int = -1
    bad: str = ""  # why the sample could not be used


# Each view's fields, of which the first that a sample has is read, and its transform.
Transforms = Mapping[str, tuple[tuple[str, ...], Transform]]
# Not a Counter: pinning copies a mapping by `update`, which doubles a Counter's counts.
ReadBatch = tuple[Batch, dict[str, int]]


class BatchReader(Dataset[ReadBatch]):
    """Reads the batch of a list of draws: (batch, samples that cannot be used by reason).

    The item of a view depends on (seed, source, position, view) alone, and torch's generator is left as it was.
    """

    def __init__(self, sources: Sequence[Source], transforms: Transforms, seed: int):
        self.sources, self.transforms, self.seed = sources, transforms, seed
        self.blanks = {view: transform.blank() for view, (_, transform) in transforms.items()}

    def __getitem__(self, draws: list[Draw]) -> ReadBatch:
        with torch.random.fork_rng(devices=[]):
            rows = [self.row(draw) for draw in draws]
        batch = Batch(
            views={v: View.stack([row.views.get(v, blank) for row in rows]) for v, blank in self.blanks.items()},
            ids=torch.tensor([row.id for row in rows], dtype=torch.int64),
            present={view: torch.tensor([view in row.views for row in rows]) for view in self.blanks},
            labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
        )
        return batch, dict(Counter(row.bad for row in rows if row.bad))

    def row(self, draw: Draw) -> Row:
        if draw.source < 0:
            return Row({})
        source, views = self.sources[draw.source], {}
        try:
            sample = source.read(draw.sample)
            for view, (fields, transform) in self.transforms.items():
                field = next((f for f in fields if f in sample.fields), None)
                if field is not None:
                    torch.default_generator.manual_seed(seed_of(self.seed, draw.source, draw.position, view))
                    views[view] = self.item(view, transform, sample.fields[field])
        except BadSample as error:
            return Row({}, int(source.ids[draw.sample]), bad=str(error))
        return Row(views, sample.id, sample.label)

    def item(self, view: str, transform: Transform, raw: Any) -> View:
        """The transform's item. BadSample: it fails, in whatever way, or gives another shape than its blank item."""
        try:
            item = transform(raw)
        except Exception as error:
            raise BadSample(f"{view}: {reason_of(error)}") from error
        if layout(item) != layout(self.blanks[view]):
            raise BadSample(f"{view}: {layout(item)} where the blank item is {layout(self.blanks[view])}")
        return item


def layout(item: View) -> str:
    mask = "" if item.mask is None else f", mask {list(item.mask.shape)}"
    return f"{item.data.dtype} {list(item.data.shape)}{mask}".removeprefix("torch.")


def reason_of(error: Exception) -> str:
    """Kind and first words of an error, without the numbers that would make every sample a reason of its own."""
    words = re.sub(r"0x[0-9a-f]+|\d+", "#", str(error).partition("\n")[0])[:80]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def seed_of(*key: int | str) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1

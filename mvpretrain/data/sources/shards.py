"""`kind: shards`: the samples of WebDataset tars, each read where its index says that it lies."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mvpretrain.config import Config
from mvpretrain.data.sources import SourceConfig
from mvpretrain.registry import refuse_untrusted
from mvpretrain.shards.headers import DamagedTar, decode_name, key_and_field, member
from mvpretrain.shards.index import FIELDS, HEAD, ID, SHARD, Index, Shard
from mvpretrain.shards.urls import command_patterns, local_copy
from mvpretrain.types import BadSample, Sample
from mvpretrain.views import ViewConfig

OPEN_FILES = 64  # in one process


class Weighted(Config):
    """Shards that make up the share weight / sum of weights of what is drawn."""

    urls: str | tuple[str, ...]
    weight: float = Field(gt=0)
    name: str | None = None


class ShardsConfig(SourceConfig):
    """WebDataset tars, local or remote.

    `train` and `eval` are urls (see `urls.expand`), lists of them, or a written index (.json); `train` may also be a
    list of weighted sources. `label` is the field that holds an integer class: `cls`, or `json:key`. `ids` says what
    makes two samples the same thing: `unique` (keys, which must all differ), `key` (equal keys are positives of each
    other) or `shard` (keys only count within their shard). Remote shards are copied whole to the folder `cache`.
    """

    kind: Literal["shards"] = "shards"
    train: str | tuple[str | Weighted, ...]
    eval: str | tuple[str, ...] | None = None
    label: str | None = None
    ids: Literal["unique", "key", "shard"] = "unique"
    cache: Path | None = None

    @model_validator(mode="after")
    def _all_weighted_or_none(self) -> ShardsConfig:
        plain = [s for s in self.train if not isinstance(s, Weighted)]
        if plain and len(plain) < len(self.train):
            raise ValueError(f"train mixes weighted sources with urls: give {plain[0]!r} a weight too, or none to any")
        if not self.train or (self.eval is not None and not self.eval):
            raise ValueError("train and eval need at least one url")
        for part in weighted(self.train) + weighted(self.eval or ""):
            for url in command_patterns(part.urls):
                refuse_untrusted(f"the url {url!r}")
        return self

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def build(self, views: Mapping[str, ViewConfig], train: bool) -> list[Tars]:
        """The sources, one for each weight, ready for the views (see `Tars.require`); [] where there is no `eval`.

        ValueError: shards that are missing or no tars, that lack a field, or that repeat a key.
        """
        listed = self.train if train else self.eval
        found: list[Tars] = []
        for part in [] if listed is None else weighted(listed):
            index = Index.find(part.urls, self.cache)
            name = part.name or (part.urls if isinstance(part.urls, str) else part.urls[0])
            found.append(Tars(index, name, part.weight, self.ids, self.label, self.cache))
        there = {field for tars in found for field in tars.totals}
        for tars in found:
            tars.require(views, there)
        if found:
            refuse_repeats(found, self.ids)
        return found


def weighted(listed: str | Sequence[str | Weighted]) -> list[Weighted]:
    """The sources of a list; urls without weights are one source, each sample of which comes once an epoch."""
    found = [s for s in listed if isinstance(s, Weighted)]
    return found or [Weighted(urls=listed if isinstance(listed, str) else tuple(map(str, listed)), weight=1)]


class Tars:
    """Samples of indexed shards, in any order, in any process: files are opened where they are first read.

    `counts` is the number of samples of each shard and `ids` the id of each sample, without what `require` dropped.
    """

    def __init__(
        self,
        index: Index,
        name: str = "shards",
        weight: float = 1.0,
        ids: Literal["unique", "key", "shard"] = "unique",
        label: str | None = None,
        cache: Path | None = None,
    ):
        self.index, self.name, self.weight, self.mode, self.cache = index, name, weight, ids, cache
        self.label, _, self.label_key = (label or "").partition(":")
        self.totals = {f: n for f in index.fields if (n := sum(s.fields.get(f, 0) for s in index.shards))}
        self.columns = {f: index.offset(f) for f in index.fields}  # of the fields that are read
        self.counts = np.array([s.nsamples for s in index.shards])
        self.selected: np.ndarray | None = None  # rows of the index that are samples; None for all
        self.known_ids: np.ndarray | None = None  # `ids`, once they were asked for
        self.files = Files()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": None, "known_ids": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"files": Files()})

    @property
    def ids(self) -> np.ndarray:
        """int64, one a sample: a hash of the key, under `shard` also of the shard's folder and file name."""
        if self.known_ids is None:
            table = self.index.table if self.selected is None else self.index.table[self.selected]
            self.known_ids = table[:, ID]
            if self.mode == "shard":
                names = ["/".join(s.url.split("/")[-2:]).encode() for s in self.index.shards]
                hashes = np.frombuffer(b"".join(blake2b(name, digest_size=8).digest() for name in names), "<i8")
                self.known_ids = self.known_ids ^ hashes[table[:, SHARD]]
        return self.known_ids

    def read(self, i: int) -> Sample:
        """Sample i, bytes by field. BadSample: its shard is not what was indexed, or its label is no integer."""
        row = self.row(i)
        fields = {f: self.contents(row[SHARD], row[at], row[at + 1]) for f, at in self.columns.items() if row[at] >= 0}
        return Sample(int(self.ids[i]), self.key(i), fields, self.class_of(fields))

    def row(self, i: int) -> list[int]:
        return self.index.table[i if self.selected is None else self.selected[i]].tolist()

    def url(self, i: int) -> str:
        """The shard that holds sample i."""
        return self.index.shards[self.row(i)[SHARD]].url

    def key(self, i: int) -> str:
        """The key of sample i, read from the header of its first member."""
        row = self.row(i)
        body = min(offset for offset in row[FIELDS::2] if offset >= 0)
        try:
            first = member(self.contents(row[SHARD], row[HEAD], body - row[HEAD]), 0, {})
        except DamagedTar as cut:
            raise BadSample(f"no header where the index has one in {self.url(i)}") from cut
        return decode_name(key_and_field(first.name)[0]) if first else ""

    def contents(self, number: int, offset: int, size: int) -> bytes:
        shard = self.index.shards[number]
        try:
            file = self.files.get(number) or self.files.open(number, self.copy_of(shard))
            found = os.pread(file, size, offset)
        except OSError as error:
            raise BadSample(f"{type(error).__name__} in {shard.url}") from error
        if len(found) < size:
            raise BadSample(f"truncated {shard.url}")
        return found

    def copy_of(self, shard: Shard) -> Path:
        return local_copy(shard.url, self.cache, shard.filesize, self.index.commands)

    def class_of(self, fields: Mapping[str, bytes]) -> int:
        """The label, -1 where the sample has none."""
        if self.label not in fields:
            return -1
        try:
            value = json.loads(fields[self.label]).get(self.label_key) if self.label_key else fields[self.label]
            return -1 if value is None else int(value)
        except (ValueError, TypeError, AttributeError) as error:
            raise BadSample(f"label {self.label}: {type(error).__name__}, an integer is needed") from error

    def damages(self) -> list[str]:
        """The tars that break off, and why; they are used up to there."""
        return [f"{problem.url}: {problem.reason}" for problem in self.index.problems]

    def require(self, views: Mapping[str, ViewConfig], elsewhere: Collection[str] = ()) -> None:
        """Read the fields that the views need and no more.

        Samples without a view whose `missing` is `drop` are left out from now on. Views of `any` may also be found in
        other sources, which have the fields `elsewhere`. ValueError: a field that no sample has, a shard without it
        under `some`, a sample without it under `none`. Asks the index alone, so that it costs seconds.
        """
        named = {view: alternatives(config.field) for view, config in views.items()}
        for view, config in views.items():
            if not {*self.totals, *(elsewhere if config.missing == "any" else ())}.intersection(named[view]):
                raise ValueError(f"view {view!r} reads the field {config.field!r}, {self.no_sample_has_it()}")
            if config.missing == "some":
                self.refuse_shards_without(view, named[view])
            if config.missing == "none":
                self.refuse_samples_without(view, named[view])
        if self.label and self.label not in {*self.totals, *elsewhere}:
            raise ValueError(f"the label is read from {self.label!r}, {self.no_sample_has_it()}")
        wanted = {self.label, *chain.from_iterable(named.values())}
        self.columns = {f: self.index.offset(f) for f in self.index.fields if f in wanted}
        if needed := [named[view] for view, config in views.items() if config.missing == "drop"]:
            self.drop(needed)

    def no_sample_has_it(self) -> str:
        return f"which no sample of {self.name!r} has; the fields there are {', '.join(self.totals)}"

    def refuse_shards_without(self, view: str, fields: list[str]) -> None:
        for shard in self.index.shards:
            if shard.nsamples and not any(shard.fields.get(f) for f in fields):
                raise ValueError(
                    f"no sample of the shard {shard.url!r} has {';'.join(fields)!r}, which view {view!r} reads; set "
                    f"views.{view}.missing to any if that is meant, or pack the shard again"
                )

    def refuse_samples_without(self, view: str, fields: list[str]) -> None:
        starts = self.index.starts
        found = np.concatenate([starts[k] + self.lacking(k, fields) for k in range(len(self.index.shards))])
        if len(found):
            first = int(found[0])
            raise ValueError(
                f"{len(found):,} samples lack {';'.join(fields)!r}, which view {view!r} reads, the first is "
                f"{self.key(first)!r} in {self.url(first)!r}; set views.{view}.missing to some, any or drop"
            )

    def lacking(self, number: int, fields: list[str]) -> np.ndarray:
        """The samples of a shard, counted within it, that have none of the fields."""
        shard = self.index.shards[number]
        counts = [shard.fields.get(f, 0) for f in fields]
        if shard.nsamples in counts:
            return np.arange(0)
        if not any(counts):
            return np.arange(shard.nsamples)
        rows = self.index.table[self.index.starts[number] : self.index.starts[number + 1]]
        columns = [self.index.offset(f) for f in fields if f in self.index.fields]
        return np.flatnonzero((rows[:, columns] < 0).all(axis=1))

    def drop(self, needed: list[list[str]]) -> None:
        """Leave out the samples that have none of the fields, for any of the lists."""
        keep = np.ones(len(self.index), bool)
        for fields in needed:
            for k in range(len(self.index.shards)):
                keep[self.index.starts[k] + self.lacking(k, fields)] = False
        if not keep.any():
            raise ValueError(f"no sample of {self.name!r} has all views of missing=drop; set it for fewer views")
        self.selected = None if keep.all() else np.flatnonzero(keep)
        self.counts = np.diff(np.concatenate([[0], np.cumsum(keep)])[self.index.starts])
        self.known_ids = None


class Files:
    """The files that this process has open, least recently used first."""

    def __init__(self) -> None:
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def get(self, number: int) -> int | None:
        if number in self.descriptors:
            self.descriptors.move_to_end(number)
        return self.descriptors.get(number)

    def open(self, number: int, path: Path) -> int:
        if len(self.descriptors) >= OPEN_FILES:
            os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors[number] = os.open(path, os.O_RDONLY)
        return self.descriptors[number]

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def alternatives(field: str) -> list[str]:
    """The fields of "jpg;png", in the order in which they are looked for. ValueError: not as shards spell them."""
    found = field.split(";")
    plain = [f.strip().lstrip(".").lower() for f in found]
    if found != plain or not all(found):
        raise ValueError(f"the field {field!r} is not spelled as in shards: write {';'.join(filter(None, plain))!r}")
    return found


def refuse_repeats(sources: Sequence[Tars], mode: str) -> None:
    """ValueError where two samples have one id, unless that is what ids=key means."""
    if mode == "key" or (mode == "unique" and len(sources) == 1 and sources[0].index.unique):
        return
    ids = np.concatenate([s.ids for s in sources])
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if not len(again):
        return
    starts = np.cumsum([0, *(len(s.ids) for s in sources)])
    one, two = order[again[0] : again[0] + 2]
    first, second = (int(np.searchsorted(starts, position, "right")) - 1 for position in (one, two))
    urls = sources[first].url(int(one - starts[first])), sources[second].url(int(two - starts[second]))
    where = f"twice in {urls[0]!r}" if urls[0] == urls[1] else f"in {urls[0]!r} and in {urls[1]!r}"
    other = " or to 'shard' if they count only within their shard" if mode == "unique" else ""
    raise ValueError(
        f"{len(again):,} keys are not unique, such as {sources[first].key(int(one - starts[first]))!r} {where}; set "
        f"data.ids to 'key' if equal keys are the same thing{other}; or pack again: the files of a sample must be "
        "neighbours in the tar"
    )

"""The index of shards: their samples, the fields, and at which byte of which tar each field of each sample lies."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import blake2b
from itertools import groupby
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvpretrain.files import FORMATS, check_format, whole_file, write_text
from mvpretrain.shards.headers import check_fields, read_headers, refuse_other_formats
from mvpretrain.shards.urls import expand, is_remote, local_copy, spelled_commands

SHARD, ID, HEAD, FIELDS = 0, 1, 2, 3  # columns of the member table; from FIELDS on, offset and size of each field
REMEDY = "write the index anew with `mvpretrain shards index`"


class Shard(NamedTuple):
    """One tar."""

    url: str
    nsamples: int
    filesize: int  # bytes
    fields: dict[str, int]  # how many of its samples have each field


class Problem(NamedTuple):
    """A damage of a shard as a whole."""

    url: str
    reason: str


class Index:
    """The samples of a list of shards, in shard order.

    `table` is int64, a row a sample: the shard's number, the 64-bit hash of the key, the byte where the sample's first
    header begins, then offset and size of each of `fields`, -1 where the sample lacks it. `problems` are damages that
    were found; what lies before them is used. `unique` is True where all keys are known to differ. `commands` are those
    of the urls that are shell commands and may be run (see `urls.spelled_commands`).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fields: Sequence[str],
        table: np.ndarray,
        problems: Sequence[Problem] = (),
        unique: bool = False,
        file: Path | None = None,
        commands: Collection[str] = (),
    ):
        assert table.shape == (sum(s.nsamples for s in shards), FIELDS + 2 * len(fields)), table.shape
        self.shards, self.fields, self.table = list(shards), list(fields), table
        self.problems, self.unique, self.file, self.commands = list(problems), unique, file, frozenset(commands)
        self.starts = np.cumsum([0, *(s.nsamples for s in shards)])

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked maps the file again instead of being sent its contents.
        return reopen, (self.shards, self.fields, self.file or self.table, self.problems, self.unique, self.commands)

    def offset(self, field: str) -> int:
        """The table's column with the offset of a field; its size is in the next one."""
        return FIELDS + 2 * self.fields.index(field)

    @classmethod
    def find(cls, urls: str | Sequence[str], cache: Path | None = None) -> Index:
        """The index of these shards: from the `index.json` beside them if it fits them, else from their headers.

        A url that ends in .json is itself a written index. ValueError: as `load`, `scan` and `expand`.
        """
        if isinstance(urls, str) and urls.endswith(".json"):
            return cls.load(urls, cache)
        if not isinstance(urls, str) and any(url.endswith(".json") for url in urls):
            return concat([cls.find(url, cache) for url in urls])
        parts, commands = [], spelled_commands(urls)
        for folder, group in groupby(expand(urls), key=lambda url: None if is_remote(url) else Path(url).parent):
            shards = list(group)
            written = index_in(folder) if folder else None
            numbers = {s.url: k for k, s in enumerate(written.shards)} if written else {}
            if written and all(url in numbers for url in shards):
                parts.append(written.pick([numbers[url] for url in shards]))
            else:
                parts += [scan_shard(url, cache, commands) for url in shards]
        return nonempty(concat(parts))

    @classmethod
    def scan(cls, urls: str | Sequence[str], cache: Path | None = None) -> Index:
        """The index read from the headers of the tars; remote ones are fetched to `cache` first.

        A tar that ends too early gives its whole samples and an entry in `problems`. ValueError: a file that is
        missing, compressed or no tar, remote shards without a cache, shards without any sample.
        """
        return scan_urls(urls, cache, spelled_commands(urls))

    def save(self, path: str | Path) -> None:
        """JSON that webdataset's `wids` reads too, and `<stem>.members.npy` beside it; each replaced as a whole.

        Urls of shards in the index's folder are written relative to it, so that the folder can be moved.
        """
        path = Path(path).absolute()
        unique = bool(self.unique or len(np.unique(self.table[:, ID])) == len(self))
        shards = [s._asdict() | {"url": relative(s.url, path.parent)} for s in self.shards]
        content = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "format": FORMATS["index"],
            "shardlist": shards,
        }
        extra = {"fields": self.fields, "unique_keys": unique, "problems": [list(p) for p in self.problems]}
        with whole_file(members_of(path)) as part, part.open("wb") as file:
            np.save(file, self.table)
        write_text(path, json.dumps(content | extra, indent=1))

    @classmethod
    def load(cls, path: str | Path, cache: Path | None = None) -> Index:
        """A written index; one of another format, or of `wids`, which has no member table, is read from the tars anew.

        ValueError: no index, or one that no longer fits the shards (missing, or another size).
        """
        path = Path(path).expanduser().absolute()
        try:
            content = json.loads(path.read_bytes())
            entries = content["shardlist"]
            urls = [e["url"] if is_remote(e["url"]) else os.path.join(path.parent, e["url"]) for e in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no shard index: {type(error).__name__}: {error}; {REMEDY}") from error
        if not members_of(path).exists() or "fields" not in content:
            return scan_urls(urls, cache)
        try:
            check_format("index", content.get("format"), path)
        except ValueError as error:
            warnings.warn(f"{error}; until then its shards are read anew", stacklevel=2)
            return scan_urls(urls, cache)
        shards = [Shard(url, e["nsamples"], e["filesize"], e["fields"]) for url, e in zip(urls, entries)]
        for shard in shards:
            check_size(shard, path)
        table = np.load(members_of(path), mmap_mode="r")
        if table.shape != (sum(s.nsamples for s in shards), FIELDS + 2 * len(content["fields"])):
            raise ValueError(f"{str(members_of(path))!r} does not belong to {path.name!r} beside it; {REMEDY}")
        problems = [Problem(*p) for p in content["problems"]]
        return cls(shards, content["fields"], table, problems, content["unique_keys"], members_of(path))

    def pick(self, numbers: Sequence[int]) -> Index:
        """The index of some of the shards, by number, in that order."""
        if list(numbers) == list(range(len(self.shards))):
            return self
        tables = [self.table[self.starts[n] : self.starts[n + 1]].copy() for n in numbers]
        for number, table in enumerate(tables):
            table[:, SHARD] = number
        shards = [self.shards[n] for n in numbers]
        problems = [p for p in self.problems if p.url in {s.url for s in shards}]
        return Index(shards, self.fields, np.concatenate(tables), problems, self.unique, commands=self.commands)


def concat(parts: Sequence[Index]) -> Index:
    """One index of several. ValueError: a shard that is listed twice, or more fields than a data set can have."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise ValueError("no shards are listed; name at least one")
    shards = [shard for part in parts for shard in part.shards]
    url, times = Counter(s.url for s in shards).most_common(1)[0]
    if times > 1:
        raise ValueError(f"the shard {url!r} is listed {times} times; list every shard once")
    fields = sorted({field for part in parts for field in part.fields})
    check_fields(fields, url)
    table = np.full((sum(len(p) for p in parts), FIELDS + 2 * len(fields)), -1, np.int64)
    columns = {field: FIELDS + 2 * k for k, field in enumerate(fields)}
    row = shard = 0
    for part in parts:
        to = [SHARD, ID, HEAD, *(columns[f] + k for f in part.fields for k in (0, 1))]
        table[row : row + len(part), to] = part.table
        table[row : row + len(part), SHARD] += shard
        row, shard = row + len(part), shard + len(part.shards)
    commands = frozenset[str]().union(*(part.commands for part in parts))
    return Index(shards, fields, table, [p for part in parts for p in part.problems], commands=commands)


def nonempty(index: Index) -> Index:
    """The index itself. ValueError: it has no sample."""
    if not len(index):
        reason = index.problems[0].reason if index.problems else "no file in them has a name of the form key.field"
        raise ValueError(f"no samples in {index.shards[0].url!r} and {len(index.shards) - 1:,} others: {reason}")
    return index


def scan_urls(urls: str | Sequence[str], cache: Path | None, commands: Collection[str] = ()) -> Index:
    """The index of shards, read from their headers. ValueError: there is no sample."""
    return nonempty(concat([scan_shard(url, cache, commands) for url in expand(urls)]))


def scan_shard(url: str, cache: Path | None, commands: Collection[str] = ()) -> Index:
    """The index of one tar, read from its headers."""
    path = local_copy(url, cache, commands=commands)
    size = path.stat().st_size
    with path.open("rb") as file:
        refuse_other_formats(file.read(512), url)
        with mmap(file.fileno(), 0, access=ACCESS_READ) as tar:
            found = read_headers(tar, url)
    fields = sorted(found.fields)
    column = np.array([FIELDS + 2 * fields.index(field) for field in found.fields], np.int64)
    row, field, offset, length = np.array(found.members, np.int64).reshape(-1, 4).T
    table = np.full((len(found.keys), FIELDS + 2 * len(fields)), -1, np.int64)
    table[:, SHARD], table[:, HEAD] = 0, found.heads
    table[:, ID] = np.frombuffer(b"".join(blake2b(key, digest_size=8).digest() for key in found.keys), "<i8")
    table[row, column[field]], table[row, column[field] + 1] = offset, length
    counts = {f: int((table[:, FIELDS + 2 * k] >= 0).sum()) for k, f in enumerate(fields)}
    problems = [Problem(url, found.reason)] if found.reason else []
    return Index([Shard(url, len(table), size, counts)], fields, table, problems, commands=commands)


def index_in(folder: Path) -> Index | None:
    """The index that is written in this folder; None where there is none of ours, or it no longer fits the shards."""
    try:
        return Index.load(folder / "index.json") if members_of(folder / "index.json").exists() else None
    except ValueError:
        return None


def reopen(
    shards: list[Shard],
    fields: list[str],
    table: np.ndarray | Path,
    problems: list[Problem],
    unique: bool,
    commands: frozenset[str],
) -> Index:
    file = table if isinstance(table, Path) else None
    rows = np.load(table, mmap_mode="r") if isinstance(table, Path) else table
    return Index(shards, fields, rows, problems, unique, file, commands)


def check_size(shard: Shard, path: Path) -> None:
    """ValueError where a local shard is not the one that was indexed."""
    if is_remote(shard.url):
        return
    size = os.path.getsize(shard.url) if os.path.exists(shard.url) else None
    if size != shard.filesize:
        now = "is not there" if size is None else f"has {size:,} bytes"
        raise ValueError(
            f"the index {str(path)!r} is stale: {shard.url!r} had {shard.filesize:,} bytes and {now}; {REMEDY}"
        )


def members_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.members.npy")


def relative(url: str, folder: Path) -> str:
    return os.path.relpath(url, folder) if not is_remote(url) and Path(url).is_relative_to(folder) else url

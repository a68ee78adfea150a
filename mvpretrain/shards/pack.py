"""Folders and tables to shards: every sample a key and its fields, shuffled once, written all or not at all."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import Any, NamedTuple

import numpy as np

from mvpretrain.files import fresh_folder
from mvpretrain.shards.index import Index
from mvpretrain.shards.plans import BINARY, folder_plans, labelled, refuse_repeats, safe, table_plans


class Written(NamedTuple):
    """What was written: `bytes` are those of the tar files, `fields` the number of samples that have each field."""

    samples: int
    bytes: int
    shards: tuple[Path, ...]
    fields: dict[str, int]

    def __str__(self) -> str:
        fields = ", ".join(f"{field} {count:,}" for field, count in sorted(self.fields.items()))
        shards = f"{len(self.shards)} shard{'s' * (len(self.shards) != 1)}"
        return f"{self.samples:,} samples in {shards}, {self.bytes / 1e6:.1f} MB ({fields})"


def pack(
    source: str | Path,
    out: str | Path,
    *,
    name: str = "shard",
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    seed: int | None = 0,
    fields: Sequence[str] = (),
    label_folders: bool | Sequence[str] = False,
) -> Written:
    """Shards `out/NAME-000000.tar` ... and `out/index.json` from a folder of files or a table of paths and values.

    Folder: `a/000.jpg` and `a/000.fou.npy` are the fields `jpg` and `fou.npy` of the sample `a_000`; a field is all
    that follows the first dot. `fields` takes only those. With `label_folders` the first sub-folder is the class: its
    number among the sorted names, or in the list that is given, is stored as `cls`, the names in `out/classes.json`.

    Table (.csv .tsv .jsonl .parquet): a column with a value that is a file, relative to the table, or whose name or
    first value has the ending of a binary file, holds paths, and every value in it must be a file. Its field is the
    column's name where that carries an ending (`jpg`, `left.jpg`), else the file's ending. Any other column holds text,
    numbers, bytes or JSON, stored under the column's name. `column:field` names the field, in the header or in
    `fields`, which also selects columns. `key` or `id` names the sample (default: the row's number). Empty cells are
    views that the sample lacks. The table, not its files, is held in memory.

    Samples are shuffled by `seed` (None: kept in order): files sorted by class would otherwise fill whole shards with
    one class, and readers that go shard by shard would hand out batches whose negatives are all of the anchor's class.

    ValueError: `out` not empty, nothing to pack, keys that repeat, a missing file; then nothing is left behind.
    """
    source, notes = Path(source), {}
    if source.is_dir():
        plans = folder_plans(source, fields)
        if label_folders is not False:
            plans, notes["classes.json"] = labelled(source, plans, None if label_folders is True else label_folders)
    elif not source.is_file():
        raise ValueError(f"{str(source)!r} is neither a folder nor a table; give the path of one")
    elif label_folders is not False:
        raise ValueError(f"label folders need a folder of files, {source.name!r} is a table; give it a column 'cls'")
    else:
        plans = table_plans(source, fields)
    if not plans:
        wanted = f"files that end in {', '.join(fields)}" if fields else "files with an ending, or rows"
        raise ValueError(f"no samples in {str(source)!r}; it needs {wanted}")
    refuse_repeats(plans)
    if seed is not None:
        random.Random(seed).shuffle(plans)
    samples = (plan.read() for plan in plans)
    return write_splits(out, {name: samples}, shard_samples, shard_bytes, notes)[name]


def write_splits(
    out: str | Path,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Written]:
    """A new folder with the shards of each split, their index, and `notes`: JSON files by name. All of it, or nothing.

    ValueError: `out` exists and is not an empty folder, and whatever `write` refuses.
    """
    with fresh_folder(Path(out)) as folder:
        written = {name: write(samples, folder, name, shard_samples, shard_bytes) for name, samples in splits.items()}
        for file, note in (notes or {}).items():
            (folder / file).write_text(json.dumps(note, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        Index.scan([str(p) for w in written.values() for p in w.shards]).save(folder / "index.json")
    return {name: w._replace(shards=tuple(Path(out) / p.name for p in w.shards)) for name, w in written.items()}


def write(
    samples: Iterable[Mapping[str, Any]],
    out: str | Path,
    name: str,
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
) -> Written:
    """Write samples `{"__key__": "cat-7", "png": bytes, "txt": str, "npy": array, "cls": int}` to `out/NAME-%06d.tar`.

    A shard is closed before it would exceed either limit, as a file (a larger sample stands alone). Equal
    samples give equal bytes. ValueError: a key that repeats or holds a dot or slash, a value its field cannot hold.
    """
    if shard_samples < 1 or shard_bytes < 1:
        raise ValueError(f"shard_samples={shard_samples} shard_bytes={shard_bytes}: both must be at least 1")
    keys: set[str] = set()
    counts = Counter[str]()
    with ShardWriter(Path(out), name, shard_samples, shard_bytes) as writer:
        for sample in samples:
            key = sample["__key__"]
            if not key or key != safe(key) or key in keys:
                problem = "comes twice" if key in keys else "holds more than letters, digits, '_' and '-'"
                raise ValueError(f"key {key!r} {problem}; every sample needs a key of its own such as 'cat-00017'")
            members = {f: encode(f, v, key) for f, v in sample.items() if not f.startswith("__")}
            if not members:
                raise ValueError(f"sample {key!r} has no field; leave it out")
            writer.add(key, members)
            keys.add(key)
            counts.update(members.keys())
    return Written(len(keys), sum(p.stat().st_size for p in writer.shards), tuple(writer.shards), dict(counts))


class ShardWriter:
    """Writes samples to numbered tar files; the next one is opened when a sample does not fit."""

    def __init__(self, out: Path, name: str, shard_samples: int, shard_bytes: int):
        self.out, self.name, self.shard_samples, self.shard_bytes = out, name, shard_samples, shard_bytes
        self.shards: list[Path] = []
        self.tar: tarfile.TarFile | None = None
        self.samples = 0
        self.opened = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        tar, size = self.tar, sum(BLOCKSIZE + rounded_up(len(data), BLOCKSIZE) for data in members.values())
        if tar is None or self.samples == self.shard_samples or tar_size(tar.offset + size) > self.shard_bytes:
            self.opened.close()
            self.shards.append(self.out / f"{self.name}-{len(self.shards):06d}.tar")
            file = tarfile.open(self.shards[-1], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  ExitStack closes it
            tar = self.tar = self.opened.enter_context(file)
            self.samples = 0
        for field, data in sorted(members.items()):
            entry = tarfile.TarInfo(f"{key}.{field}")  # its time is 0, so that equal samples give equal tars
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        self.samples += 1


def rounded_up(size: int, block: int) -> int:
    return -(-size // block) * block


def tar_size(members: int) -> int:
    """Bytes of a tar with so many bytes of members: two empty blocks end it, whole records fill it."""
    return rounded_up(members + 2 * BLOCKSIZE, RECORDSIZE)


def encode(field: str, value: Any, key: str) -> bytes:
    """The bytes of a field by its ending. ValueError: a value that such a field cannot hold."""
    ending = field.rpartition(".")[2]
    try:
        if ending == "cls":
            return str(int(value)).encode()
        if isinstance(value, bytes):
            return value
        if ending == "npy" and isinstance(value, np.ndarray | list):
            return array_bytes(value if isinstance(value, np.ndarray) else np.asarray(value, dtype=np.float32))
        if isinstance(value, str) and ending not in BINARY:
            return value.encode()
        if isinstance(value, dict | list | int | float) and ending not in BINARY:
            return json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:
        raise ValueError(f"sample {key!r}: field {field!r} cannot hold {repr(value)[:80]}: {error}") from error
    raise ValueError(f"sample {key!r}: field {field!r} cannot hold a {type(value).__name__}; give its bytes")


def array_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()

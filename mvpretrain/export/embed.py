"""Whole shards through exported encoders, to arrays or a table on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track

from mvpretrain.config import unknown
from mvpretrain.data.build import build_stream, count_samples
from mvpretrain.data.loader import Stream, StreamConfig
from mvpretrain.data.sources.shards import ShardsConfig, Tars
from mvpretrain.export.encoder import Exported, exported_views, load
from mvpretrain.files import fresh_folder, whole_file
from mvpretrain.types import BadSample, Batch


class EmbeddedBatch(NamedTuple):
    """Some consecutive samples, embedded."""

    start: int
    keys: list[str]
    ids: np.ndarray  # int64: the hash of the key
    present: dict[str, np.ndarray]  # bool, by view
    z: dict[str, np.ndarray]  # n d float32, by view; zeros where absent


class EmbedCounts(NamedTuple):
    """How many samples were embedded, and how many of them could not be used, by reason: they are absent everywhere."""

    samples: int
    bad: dict[str, int]


WriteBatch = Callable[[EmbeddedBatch], None]


def embed(
    export_folder: str | Path,
    urls: str | Sequence[str],
    out: str | Path,
    views: Sequence[str] | None = None,
    batch: int = 256,
    limit: int | None = None,
    workers: int = 2,
    cache: Path | None = None,
    trust: bool = False,
) -> EmbedCounts:
    """Embed the samples of shards in their order, or the first `limit`.

    `out` is a folder for `<view>.npy` (n d, float32 unit rows), `present_<view>.npy`, `ids.npy` and `keys.txt`, or a
    file that ends in .parquet, with one list column a view. Samples without a view, or that cannot be read, keep their
    row: zeros and present False, null in parquet. It appears only when it is whole. Remote shards go to `cache`. The
    export may name classes outside of this package only with `trust`.

    ValueError: no export, no such view, no such shards, a field that no sample has, `out` exists, a batch or limit
    below 1.
    """
    out = Path(out)
    if batch < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch={batch} limit={limit}: both are at least 1; leave limit out to embed everything")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; give another path, or remove it first")
    exports = load_views(Path(export_folder), views, trust)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for exported in exports.values():
        exported.to(device)
    stream = shard_stream(urls, cache, exports, max(2, batch), workers)
    total = count_samples(stream.sources)
    count = min(limit or total, total)
    bad: Counter[str] = Counter()
    opened = parquet_file if out.suffix == ".parquet" else array_folder
    with opened(out, {name: exported.dim for name, exported in exports.items()}, count) as write_batch:
        for embedded, reasons in embedded_batches(stream, exports, count, device):
            write_batch(embedded)
            bad.update(reasons)
    print_counts(count, exports, bad, out)
    return EmbedCounts(count, dict(bad))


def load_views(folder: Path, views: Sequence[str] | None, trust: bool) -> dict[str, Exported]:
    """The chosen views of an export, all where none is named. ValueError: no such view, or a name that is taken."""
    known = exported_views(folder)
    for name in views or ():
        if name not in known:
            raise ValueError(f"{str(folder)!r}: {unknown('view', name, known)}")
    exports = {name: load(folder, name, trust) for name in views or known}
    taken = {"id", "ids", "key", *(f"present_{name}" for name in exports)}.intersection(exports)
    if taken:
        raise ValueError(f"view {min(taken)!r} has the name of a file or column that is written beside it; rename it")
    return exports


def shard_stream(
    urls: str | Sequence[str], cache: Path | None, exports: Mapping[str, Exported], batch: int, workers: int
) -> Stream:
    """All samples of the shards, whichever views they have."""
    urls = urls if isinstance(urls, str) else tuple(urls)
    data = ShardsConfig.model_validate({"train": urls, "ids": "key", "cache": cache})
    views = {name: exported.view.model_copy(update={"missing": "any"}) for name, exported in exports.items()}
    transforms = {name: (e.view.fields, e.transform) for name, e in exports.items()}
    stream = build_stream(data, views, "train", batch, 0, StreamConfig(workers=workers), transforms=transforms)
    assert stream is not None
    return stream


@torch.no_grad()
def embedded_batches(
    stream: Stream, exports: Mapping[str, Exported], count: int, device: torch.device
) -> Iterator[tuple[EmbeddedBatch, dict[str, int]]]:
    """(a batch, its samples that could not be used by reason), in the samples' order."""
    (tars,) = stream.sources
    assert isinstance(tars, Tars)
    batches, batch = stream.once(np.arange(count)), stream.batch
    steps = -(-count // batch)
    for step, (read, reasons) in enumerate(track(batches, "embedding", steps, transient=True)):
        start, stop = step * batch, min((step + 1) * batch, count)
        yield embed_batch(read, exports, start, [key_of(tars, i) for i in range(start, stop)], device), reasons


def embed_batch(
    batch: Batch, exports: Mapping[str, Exported], start: int, keys: list[str], device: torch.device
) -> EmbeddedBatch:
    """The rows of a batch that have a key; those after them are padding."""
    real = slice(len(keys))
    z, present = {}, {}
    for name, exported in exports.items():
        present[name] = batch.present[name][real].numpy()
        rows = exported(batch.views[name].to(device))[real].cpu().numpy()
        z[name] = np.where(present[name][:, None], rows, np.float32(0))
    return EmbeddedBatch(start, keys, batch.ids[real].numpy(), present, z)


def key_of(tars: Tars, i: int) -> str:
    """The key of sample i, empty where its shard can no longer be read."""
    try:
        return tars.key(i)
    except BadSample:
        return ""


@contextmanager
def array_folder(out: Path, dims: Mapping[str, int], count: int) -> Iterator[WriteBatch]:
    """A folder of .npy files, written in place through memory maps, and keys.txt."""
    with fresh_folder(out) as folder, (folder / "keys.txt").open("w", encoding="utf-8") as keys:

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape))

        ids = array("ids", np.int64)
        z = {name: array(name, np.float32, dim) for name, dim in dims.items()}
        present = {name: array(f"present_{name}", np.bool_) for name in dims}

        def write_batch(batch: EmbeddedBatch) -> None:
            rows = slice(batch.start, batch.start + len(batch.keys))
            ids[rows] = batch.ids
            for name in dims:
                z[name][rows], present[name][rows] = batch.z[name], batch.present[name]
            keys.writelines(f"{key}\n" for key in batch.keys)

        yield write_batch
        for written in (ids, *z.values(), *present.values()):
            written.flush()


@contextmanager
def parquet_file(out: Path, dims: Mapping[str, int], count: int) -> Iterator[WriteBatch]:
    """One table: key, id, and a list of `dim` numbers a view. ValueError: pyarrow is not installed."""
    try:
        import pyarrow as pa
        from pyarrow import parquet as pq
    except ImportError as error:
        raise ValueError(f"{str(out)!r} needs pyarrow; pip install 'mvpretrain[parquet]'") from error
    lists = {name: pa.list_(pa.float32(), dim) for name, dim in dims.items()}
    schema = pa.schema([("key", pa.string()), ("id", pa.int64()), *lists.items()])

    def write_batch(batch: EmbeddedBatch) -> None:
        columns = [pa.array(batch.keys), pa.array(batch.ids)]
        for name, dim in dims.items():
            flat = pa.array(batch.z[name].ravel())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(~batch.present[name])))
        writer.write_batch(pa.record_batch(columns, schema=schema))

    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part, pq.ParquetWriter(part, schema) as writer:
        yield write_batch


def print_counts(count: int, exports: Mapping[str, Exported], bad: Counter[str], out: Path) -> None:
    print(f"{count:,} samples embedded as {', '.join(exports)}: {out}")
    if bad:
        named = ", ".join(f"{reason} {number:,}" for reason, number in bad.most_common(5))
        print(f"{bad.total():,} of them could not be used and have zeros: {named}")

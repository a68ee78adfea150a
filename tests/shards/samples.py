"""Small samples, tars of them, and fields of real formats, for the tests of shards and of what reads them."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter


def samples_of(count: int, start: int = 0) -> list[dict[str, bytes]]:
    """Samples with a key, `bin`, `cls` and, for odd ones, `txt`, of sizes that differ."""
    rows = []
    for i in range(start, start + count):
        row = {"__key__": f"s{i:05d}", "bin": bytes([i % 251]) * (i * 37 % 1500), "cls": str(i % 7).encode()}
        rows.append(row | ({"txt": f"text {i}".encode()} if i % 2 else {}))
    return rows


def write_shards(folder: Path, samples: Sequence[Mapping[str, object]], shards: int = 1, name: str = "s") -> list[str]:
    """Tars `name-0000.tar` ... with the samples in order, as equal in number as can be."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{name}-{k:04d}.tar") for k in range(shards)]
    bounds = [len(samples) * k // shards for k in range(shards + 1)]
    for path, start, end in zip(paths, bounds, bounds[1:]):
        with TarWriter(path) as writer:
            for sample in samples[start:end]:
                writer.write(dict(sample))
    return paths


def plain(samples: Sequence[Mapping[str, bytes]]) -> list[dict[str, bytes]]:
    return [{k: v for k, v in s.items() if k != "__key__"} for s in samples]


def picture(kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tone(seconds: float = 0.1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((1000 * np.sin(np.arange(int(8000 * seconds)))).astype("<i2").tobytes())
    return stream.getvalue()

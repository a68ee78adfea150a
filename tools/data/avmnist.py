"""Pairs of an MNIST image and a spoken digit of the same class, with a caption, as shards.

    python -m tools.data.avmnist MNIST_FOLDER FSDD_FOLDER OUT [--train 6000] [--test 1000] [--val 50] [--tail 100]

MNIST_FOLDER holds the four idx files, gzipped or not; FSDD_FOLDER the Free Spoken Digit Dataset's
`{digit}_{speaker}_{take}.wav`, in itself or in `recordings/`. Images are drawn without replacement and each is given a
recording of its class, drawn with replacement: there are 2,700 recordings to train on, so that they recur with other
images. `test` pairs MNIST's test images with takes 0 to 4, FSDD's official test part; no image or recording is in both.
`--tail` and `--val`: see long_tail.py; `val` has recordings of training's takes.

Fields: `png` (28 x 28, grey), `wav` (8 kHz, as recorded), `txt` (see digits.py), `cls`.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvpretrain.shards.pack import write_splits
from tools.data.digits import caption, png
from tools.data.long_tail import add_options, add_val, drawn, parts


def idx(folder: Path, name: str) -> np.ndarray:
    """The array of an idx file of bytes (http://yann.lecun.com/exdb/mnist), `name` or `name.gz`."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{str(path)!r} is no idx file of bytes, it starts with {raw[:4]!r}; fetch it again")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def recordings(folder: Path, test: bool) -> list[list[Path]]:
    """The recordings of each digit, of takes 0 to 4 or of the others."""
    found: list[list[Path]] = [[] for _ in range(10)]
    place = folder / "recordings" if (folder / "recordings").is_dir() else folder
    for path in sorted(place.glob("[0-9]_*_*.wav")):
        digit, _, take = path.stem.split("_")
        if (int(take) < 5) == test:
            found[int(digit)].append(path)
    if not all(found):
        lacking = [digit for digit, paths in enumerate(found) if not paths]
        raise ValueError(
            f"no {'test' if test else 'train'} recording of {lacking} in {str(place)!r}; give FSDD's folder"
        )
    return found


def pairs(
    images: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    spoken: list[list[Path]],
    split: str,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    for row in rows.tolist():
        digit = int(labels[row])
        yield {
            "__key__": f"{split}-{row:05d}",
            "png": png(images[row]),
            "wav": spoken[digit][rng.integers(len(spoken[digit]))].read_bytes(),
            "txt": caption(digit, rng),
            "cls": digit,
        }


def splits(args: argparse.Namespace) -> dict[str, Iterator[dict[str, Any]]]:
    rng = np.random.default_rng(args.seed)
    found = {}
    for part, test in (("train", False), ("t10k", True)):
        images, labels = idx(args.mnist, f"{part}-images-idx3-ubyte"), idx(args.mnist, f"{part}-labels-idx1-ubyte")
        spoken = recordings(args.fsdd, test)
        rows = {"test": drawn(labels, args.test, 1.0, rng)} if test else parts(labels, args, rng)
        found |= {split: pairs(images, labels, chosen, spoken, split, rng) for split, chosen in rows.items()}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path, metavar="MNIST_FOLDER")
    parser.add_argument("fsdd", type=Path, metavar="FSDD_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    add_options(parser, "pairs", 6000)
    add_val(parser)
    parser.add_argument("--test", type=int, default=1000, help="held-out pairs (1000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, written in write_splits(args.out, splits(args), shard_samples=1000).items():
        print(f"{name}: {written}")


if __name__ == "__main__":
    main()

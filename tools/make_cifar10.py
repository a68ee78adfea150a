"""CIFAR-10, or any set of images in class folders, as shards.

    python tools/make_cifar10.py SOURCE OUT

SOURCE is a folder with train/<class>/*.jpg and test/<class>/*.jpg (or .png), or a tar of it, compressed or not. It is
held in memory. Fields: the image as it is, under its ending; `cls`, the place of its class among the sorted names,
which OUT/classes.json lists. Both parts are shuffled: in the source they are sorted by class.
"""

from __future__ import annotations

import argparse
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from mvpretrain.shards.pack import write_splits
from mvpretrain.shards.sources import safe

SPLITS = ("train", "test")


def load(source: Path) -> dict[tuple[str, str, str], bytes]:
    """{(split, class, file name): contents} of a folder or tar, sorted. ValueError: no such images."""
    if source.is_dir():
        found = {p.relative_to(source).parts: p.read_bytes() for p in source.glob("*/*/*.*")}
    else:
        with tarfile.open(source) as tar:
            found = {PurePath(m.name).parts[-3:]: contents(tar, m) for m in tar if m.isfile()}
    images = {k: found[k] for k in sorted(found) if len(k) == 3 and k[0] in SPLITS and k[2].endswith((".jpg", ".png"))}
    if {k[0] for k in images} != set(SPLITS):
        raise ValueError(f"{str(source)!r} must hold train/<class>/*.jpg and test/<class>/*.jpg; give the folder above")
    return images


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def samples(
    images: dict[tuple[str, str, str], bytes], split: str, classes: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    keys = [key for key in images if key[0] == split]
    random.Random(seed).shuffle(keys)
    for key in keys:
        stem, _, ending = key[2].rpartition(".")
        yield {"__key__": safe(f"{split}_{key[1]}_{stem}"), ending: images[key], "cls": classes.index(key[1])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    images = load(args.source)
    classes = sorted({key[1] for key in images})
    splits = {split: samples(images, split, classes, args.seed) for split in SPLITS}
    for name, written in write_splits(args.out, splits, shard_samples=5000, notes={"classes.json": classes}).items():
        print(f"{name}: {written}")


if __name__ == "__main__":
    main()

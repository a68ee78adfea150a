"""CIFAR-10, or any set of images in class folders, as shards.

    python -m tools.data.cifar10 SOURCE OUT [--train 2500] [--val 100] [--tail 100]

SOURCE is a folder with train/<class>/*.jpg and test/<class>/*.jpg (or .png), or a tar of it, compressed or not. It is
held in memory. Fields: the image as it is, under its ending; `cls`, the index of its class among the sorted names,
which OUT/classes.json lists. Both parts are shuffled: in the source they are sorted by class. `--tail` and `--val`: see
long_tail.py.
"""

from __future__ import annotations

import argparse
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mvpretrain.shards.pack import write_splits
from mvpretrain.shards.plans import safe
from tools.data.long_tail import add_options, add_val, parts

Key = tuple[str, str, str]  # split, class, file name


def load(source: Path, splits: Sequence[str] = ("train", "test")) -> dict[Key, bytes]:
    """{(split, class, file name): contents} of a folder or tar, sorted. ValueError: no such images."""
    if source.is_dir():
        found = {p.relative_to(source).parts: p.read_bytes() for p in source.glob("*/*/*.*")}
    else:
        with tarfile.open(source) as tar:
            found = {PurePath(m.name).parts[-3:]: contents(tar, m) for m in tar if m.isfile()}
    images = {k: found[k] for k in sorted(found) if len(k) == 3 and k[0] in splits and k[2].endswith((".jpg", ".png"))}
    if {k[0] for k in images} != set(splits):
        wanted = " and ".join(f"{split}/<class>/*.jpg" for split in splits)
        raise ValueError(f"{str(source)!r} must hold {wanted} (or .png); give the folder above")
    return images


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def chosen(images: Iterable[Key], args: argparse.Namespace) -> dict[str, list[Key]]:
    """{split: its images, shuffled}; those of `train` as `args` ask for them."""
    keys: dict[str, list[Key]] = {}
    for key in images:
        keys.setdefault(key[0], []).append(key)
    for found in keys.values():
        random.Random(args.seed).shuffle(found)
    train = keys["train"]
    labels = np.unique([key[1] for key in train], return_inverse=True)[1]
    drawn = parts(labels, args, np.random.default_rng(args.seed))
    return keys | {split: [train[i] for i in rows] for split, rows in drawn.items()}


def samples(images: dict[Key, bytes], keys: Iterable[Key], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for key in keys:
        split, name, file = key
        stem, _, ending = file.rpartition(".")
        yield {"__key__": safe(f"{split}_{name}_{stem}"), ending: images[key], "cls": classes.index(name)}


def write(images: dict[Key, bytes], args: argparse.Namespace, names: Sequence[str] = ()) -> None:
    """The shards in `args.out`; `names` are those of the classes where their folders have others."""
    classes = sorted({key[1] for key in images})
    splits = {split: samples(images, keys, classes) for split, keys in chosen(images, args).items()}
    notes = {"classes.json": list(names or classes)}
    for name, written in write_splits(args.out, splits, shard_samples=5000, notes=notes).items():
        print(f"{name}: {written}")


def arguments(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, "images")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_val(parser)
    args = parser.parse_args(argv)
    write(load(args.source), args)


if __name__ == "__main__":
    main()

"""Which samples a tool packs to train on: all, so many, or a long tail of the classes; and some set aside before.

In a long tail of ratio R, the class at position p of C comes in proportion to R ** (-p / (C - 1)): the first is R times
as frequent as the last (Cui et al., CVPR 2019, section 5.1). Positions are a fixed random permutation of the classes,
whose own order may mean something, as that of digits does.
"""

from __future__ import annotations

import argparse

import numpy as np

PERMUTATION = 1  # the seed of the classes' positions, the same whatever is drawn


def add_options(parser: argparse.ArgumentParser, what: str, train: int | None = None) -> None:
    parser.add_argument("--train", type=int, default=train, help=f"training {what} ({train or 'all that there are'})")
    parser.add_argument(
        "--tail", type=float, default=1.0, metavar="R", help="the most frequent class of `train` over the rarest (1)"
    )


def add_val(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--val", type=int, default=0, help="so many of each class set aside from `train` as `val` (0)")


def parts(labels: np.ndarray, options: argparse.Namespace, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{split: rows of its samples}: `train`, and the balanced `val` where `options` ask for one."""
    if not getattr(options, "val", 0):
        return {"train": drawn(labels, options.train, options.tail, rng)}
    val, rest = aside(labels, options.val, rng)
    return {"train": rest[drawn(labels[rest], options.train, options.tail, rng)], "val": val}


def drawn(labels: np.ndarray, total: int | None, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of samples drawn without replacement, shuffled; all in their order where nothing else is asked for.

    ValueError: a ratio below 1, a class with fewer samples than are wanted, or of which none would be left.
    """
    if ratio < 1:
        raise ValueError(f"--tail is {ratio:g}, the most frequent class over the rarest; give 1 or more")
    if ratio == 1 and total is None:
        return np.arange(len(labels))
    counts = np.bincount(labels)
    chosen = []
    for label, size in enumerate(sizes(counts, total, ratio)):
        if not size:
            raise ValueError(f"class {label} would be left without a sample by --tail {ratio:g}; give a lower one")
        if size > counts[label]:
            raise ValueError(f"{size:,} of class {label} are wanted, there are {counts[label]:,}; ask for fewer")
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:size])
    return rng.permutation(np.concatenate(chosen))


def sizes(counts: np.ndarray, total: int | None, ratio: float) -> np.ndarray:
    """How many of each class are drawn from `counts`; with `total` None the most that the profile allows."""
    share = counts / counts.sum() if ratio == 1 else ratio ** (-positions(len(counts)) / (len(counts) - 1))
    if total is None:
        return np.round(share * (counts / share).min()).astype(int)
    return np.diff(np.round(np.cumsum([0, *share * (total / share.sum())]))).astype(int)


def positions(classes: int) -> np.ndarray:
    """The position of each class in the tail, 0 for the most frequent."""
    return np.random.default_rng(PERMUTATION).permutation(classes)


def aside(labels: np.ndarray, each: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `each` samples of every class, shuffled, and all others in order). ValueError: too few are there."""
    counts = np.bincount(labels)
    if each >= counts.min():
        rarest = int(counts.argmin())
        raise ValueError(f"--val {each} leaves nothing of the {counts[rarest]:,} of class {rarest}; ask for fewer")
    taken = [rng.permutation(np.flatnonzero(labels == label))[:each] for label in range(len(counts))]
    val = rng.permutation(np.concatenate(taken))
    return val, np.setdiff1d(np.arange(len(labels)), val)

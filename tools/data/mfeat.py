"""UCI Multiple Features (2,000 handwritten digits, six sets of features) as shards with six vector views.

    python -m tools.data.mfeat MFEAT_FOLDER OUT

MFEAT_FOLDER holds mfeat-{fou,fac,kar,pix,zer,mor}.csv: a header row, one row a digit, the label last.
Fields: `fou.npy` (76 Fourier coefficients), `fac.npy` (216 profile correlations), `kar.npy` (64 Karhunen-Loeve
coefficients), `pix.npy` (240 pixel averages), `zer.npy` (47 Zernike moments), `mor.npy` (6 morphological features);
`cls`. A fifth is held out as `test`, stratified by class.

Their scales differ by factors of a thousand: each feature is brought to mean 0 and deviation 1 over the training
part here; OUT/stats.json holds the constants, for features of other digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvpretrain.shards.pack import write_splits
from tools.data.digits import split

VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")


def load(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features by view, `n dim` float32, and the labels that all six tables agree on."""
    tables = {v: np.loadtxt(folder / f"mfeat-{v}.csv", delimiter=",", skiprows=1) for v in VIEWS}
    labels = tables["fou"][:, -1].astype(int)
    for view, table in tables.items():
        if not np.array_equal(table[:, -1], labels):
            raise ValueError(
                f"mfeat-{view}.csv has other labels than mfeat-fou.csv; their rows must be the same digits"
            )
    return {v: table[:, :-1].astype(np.float32) for v, table in tables.items()}, labels


def samples(features: dict[str, np.ndarray], labels: np.ndarray, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    for row in rows:
        arrays = {f"{view}.npy": table[row] for view, table in features.items()}
        yield {"__key__": f"mfeat-{row:05d}", **arrays, "cls": int(labels[row])}


def constants(train: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and deviation of each feature, 1 for the deviation of one that never changes."""
    std = train.std(axis=0, dtype=np.float64)
    return {"mean": train.mean(axis=0, dtype=np.float64), "std": np.where(std > 0, std, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="MFEAT_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    features, labels = load(args.folder)
    train, test = split(labels, np.random.default_rng(args.seed))
    stats = {view: constants(table[train]) for view, table in features.items()}
    scaled = {v: ((table - stats[v]["mean"]) / stats[v]["std"]).astype(np.float32) for v, table in features.items()}
    splits = {"train": samples(scaled, labels, train), "test": samples(scaled, labels, test)}
    notes = {"stats.json": {v: {k: x.tolist() for k, x in both.items()} for v, both in stats.items()}}
    for name, written in write_splits(args.out, splits, shard_samples=400, notes=notes).items():
        print(f"{name}: {written}")


if __name__ == "__main__":
    main()

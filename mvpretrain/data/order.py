"""The order of samples, as a pure function of a seed and a position: it can be entered anywhere, by anyone.

Random numbers are raw Philox words. numpy keeps those for ever, unlike what its distributions make of them, so that a
run resumes to the same batches under a later numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

BLOCK = 4096  # draws with replacement that are made at once
SHARDS, WINDOW, DRAWS, SOURCES = range(4)  # purposes, so that no two draws share random numbers


class Order:
    """Which sample comes at each position of an endless sequence, for samples that lie in shards.

    Each N = sum(counts) positions from a multiple of N on are an epoch, which has every sample once: the shards in an
    order of the epoch's own, neighbours together in windows of at least `shuffle` samples, and a permutation within
    each window. So only the shards of one window are read at a time, and memory is O(window + shards). `shuffle` 0 is
    index order. With `replacement` each position is an independent uniform draw from all shards.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        seed: int,
        shuffle: int = 0,
        replacement: bool = False,
        source: int = 0,
    ):
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.size = int(self.starts[-1])
        assert self.size > 0 and seed >= 0 and shuffle >= 0, (self.size, seed, shuffle)
        self.seed, self.source, self.shuffle, self.replacement = seed, source, shuffle, replacement
        self.current: tuple[int, np.ndarray] = (0, np.arange(0))  # the stretch drawn last
        self.planned: tuple[int, np.ndarray, list[int]] = (-1, np.arange(0), [])

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at ascending positions, both int64."""
        if not self.shuffle and not self.replacement:
            return positions % self.size
        found, done = np.empty_like(positions), 0
        while done < len(positions):
            first, samples = self.stretch(int(positions[done]))
            upto = int(np.searchsorted(positions, first + len(samples)))
            found[done:upto] = samples[positions[done:upto] - first]
            done = upto
        return found

    def stretch(self, position: int) -> tuple[int, np.ndarray]:
        """(first position, samples) of the run of positions around this one that are drawn together."""
        first, samples = self.current
        if not first <= position < first + len(samples):
            epoch, inside = divmod(position, self.size)
            self.current = self.block(position // BLOCK) if self.replacement else self.window(epoch, inside)
        return self.current

    def block(self, number: int) -> tuple[int, np.ndarray]:
        draws = words(BLOCK, self.seed, self.source, DRAWS, number) % np.uint64(self.size)
        return number * BLOCK, draws.astype(np.int64)

    def window(self, epoch: int, position: int) -> tuple[int, np.ndarray]:
        """The window of an epoch that holds its position number `position`, counted from the epoch's start."""
        if self.planned[0] != epoch:
            self.planned = (epoch, *self.plan(epoch))
        _, shards, bounds = self.planned
        ends = np.concatenate([[0], np.cumsum(self.counts[shards])])[bounds]
        number = int(np.searchsorted(ends, position, "right")) - 1
        inside = shards[bounds[number] : bounds[number + 1]]
        samples = np.concatenate([self.starts[s] + np.arange(int(self.counts[s])) for s in inside.tolist()])
        shuffled = samples[permutation(len(samples), self.seed, self.source, WINDOW, epoch, number)]
        return epoch * self.size + int(ends[number]), shuffled

    def plan(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """(shards in the epoch's order, bounds of its windows in that list); a short rest joins the last window."""
        shards = permutation(len(self.counts), self.seed, self.source, SHARDS, epoch)
        ends = np.cumsum(self.counts[shards])
        bounds, filled = [0], 0
        while (last := int(np.searchsorted(ends, filled + self.shuffle))) < len(ends):
            bounds.append(last + 1)
            filled = int(ends[last])
        return shards, [*(bounds[:-1] or bounds), len(shards)]


class Mix:
    """From which source each row of a global batch is drawn, by weight.

    `sample`: every row by itself. `batch`: all rows of a batch from one source, so that its negatives are of one kind.
    """

    def __init__(self, weights: Sequence[float], seed: int, mode: Literal["sample", "batch"] = "sample"):
        assert len(weights) and min(weights) > 0, weights
        self.ends = np.cumsum(weights)[:-1] / np.sum(weights)
        self.seed, self.mode = seed, mode

    def sources(self, step: int, batch: int) -> np.ndarray:
        """The source of each of the batch's rows, int64."""
        uniform = (words(batch, self.seed, 0, SOURCES, step) >> np.uint64(11)) * 2.0**-53
        if self.mode == "batch":
            uniform = np.repeat(uniform[:1], batch)
        return np.searchsorted(self.ends, uniform, "right")


def permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(words(count, *key), kind="stable")


def words(count: int, *key: int) -> np.ndarray:
    """Random 64-bit words that depend on the key alone."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)

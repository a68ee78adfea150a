"""Global batches as a pure function of (seed, cursor), whatever the ranks and workers; each rank reads its own rows."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from threading import Thread
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader

from mvpretrain.config import Config
from mvpretrain.data.dataset import BatchReader, Draw, ReadBatch, Transforms
from mvpretrain.data.order import Mix, Order
from mvpretrain.types import Batch, Source

JUDGED_FROM = 200  # samples, before which the share of bad ones is not judged


class StreamConfig(Config):
    """How samples are drawn and read.

    `workers` are processes a rank (0: read in the training process), which prepare `prefetch` batches ahead. `shuffle`
    is the least number of samples that are mixed at once, 0 keeps the order of the shards. `replacement` draws each
    sample independently. `mix` says whether weighted sources share each batch (`sample`) or take turns (`batch`). The
    run stops where more than `max_bad_share` of the samples cannot be used, or `max_bad_in_row` one after another.
    """

    workers: int = Field(default=2, ge=0)
    shuffle: int = Field(default=16384, ge=0)
    replacement: bool = False
    mix: Literal["sample", "batch"] = "sample"
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    max_bad_in_row: int = Field(default=100, ge=1)
    prefetch: int = Field(default=4, ge=1)


class Cursor(NamedTuple):
    """A position between two global batches."""

    step: int  # batches before it
    drawn: tuple[int, ...]  # samples before it, by source


class Stream:
    """Batches of `batch` rows over `size` ranks, of which this rank gets rows [rank b, (rank + 1) b), b = batch / size.

    `transforms` maps each view to the fields that it may be read from, of which the first counts, and its transform.
    Order, mixing and augmentation depend on the seed and the cursor alone: another number of ranks or workers gives
    the same global batches, and a run may go on from a cursor with any of them. ValueError: a batch below 2 or not
    divisible by the ranks, a negative seed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transforms: Transforms,
        batch: int,
        seed: int,
        config: StreamConfig,
        rank: int = 0,
        size: int = 1,
        pin: bool = False,
    ):
        if batch < 2 or batch % size:
            raise ValueError(
                f"the global batch is {batch} on {size} ranks; give at least 2, and a multiple of the ranks"
            )
        if seed < 0:
            raise ValueError(f"the seed is {seed}; give one that is not negative")
        assert sources and 0 <= rank < size, (len(sources), rank, size)
        self.sources, self.batch, self.seed, self.config, self.pin = sources, batch, seed, config, pin
        self.first, self.last = rank * batch // size, (rank + 1) * batch // size
        self.mix = Mix([s.weight for s in sources], seed, config.mix)
        self.reader = BatchReader(sources, transforms, seed)

    def start(self) -> Cursor:
        return Cursor(0, (0,) * len(self.sources))

    def advance(self, cursor: Cursor) -> Cursor:
        """The cursor one global batch later."""
        counts = np.bincount(self.mix.sources(cursor.step, self.batch), minlength=len(self.sources))
        return Cursor(cursor.step + 1, tuple(d + int(c) for d, c in zip(cursor.drawn, counts)))

    def batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor, Counter[str]]]:
        """This rank's rows of each batch from the cursor on: (rows, cursor after them, skipped samples by reason).

        A sample that cannot be read or decoded is a row that is absent in all views and keeps its id. Without
        end: batches straddle epochs, so that all are full.
        """
        for batch, skipped in self.loader(self.plan(cursor)):
            cursor = self.advance(cursor)
            yield batch, cursor, Counter(skipped)

    def whole(self, limit: int | None = None) -> Iterator[Batch]:
        """Every sample once, in index order, or `limit` of them, evenly spaced, since shards may be sorted by class.

        All ranks get equally many batches of equal size; the last is filled with absent rows of id -1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"the limit of evaluated samples is {limit}; give at least 1, or none for all")
        total = sum(int(s.counts.sum()) for s in self.sources)
        count = min(limit or total, total)
        for batch, _ in self.once(np.arange(count) * total // count):
            yield batch

    def once(self, samples: np.ndarray) -> Iterator[ReadBatch]:
        """(this rank's rows, skipped samples by reason) of each batch of these samples, counted through all sources.

        All ranks get equally many batches of equal size; the last is filled with absent rows of id -1.
        """
        yield from self.loader(self.plan_once(samples))

    def plan(self, cursor: Cursor) -> Iterator[list[Draw]]:
        """What this rank draws in each batch from the cursor on."""
        shuffle, replacement = self.config.shuffle, self.config.replacement
        orders = [Order(s.counts, self.seed, shuffle, replacement, k) for k, s in enumerate(self.sources)]
        while True:
            mixed = self.mix.sources(cursor.step, self.batch)
            draws: dict[int, Draw] = {}
            for k, order in enumerate(orders):
                rows = np.flatnonzero(mixed == k)
                mine = np.flatnonzero((rows >= self.first) & (rows < self.last))
                positions = cursor.drawn[k] + mine
                found = zip(rows[mine].tolist(), positions.tolist(), order(positions).tolist())
                draws |= {row: Draw(k, position, sample) for row, position, sample in found}
            yield [draws[row] for row in range(self.first, self.last)]
            cursor = self.advance(cursor)

    def plan_once(self, chosen: np.ndarray) -> Iterator[list[Draw]]:
        """What this rank draws in each batch of the chosen samples."""
        ends = np.cumsum([s.counts.sum() for s in self.sources])
        for start in range(0, len(chosen), self.batch):
            mine = chosen[start + self.first : start + self.last]
            sources = np.searchsorted(ends, mine, "right")
            samples = mine - np.concatenate([[0], ends])[sources]
            draws = [Draw(k, i, i) for k, i in zip(sources.tolist(), samples.tolist())]
            yield draws + [Draw(-1, 0, 0)] * (self.last - self.first - len(draws))

    def loader(self, draws: Iterable[list[Draw]]) -> DataLoader[ReadBatch]:
        workers = self.config.workers
        return DataLoader(
            self.reader,
            batch_size=None,
            sampler=draws,
            num_workers=workers,
            # Forked workers share the index and the imports; a fork server's would load both anew, each for itself.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            prefetch_factor=-(-self.config.prefetch // workers) if workers else None,
            collate_fn=as_read,
            pin_memory=self.pin,
            worker_init_fn=end_by_parent_alone,
            generator=torch.Generator(),  # else each start would draw from the training's own random numbers
        )


class BadSamples:
    """Counts samples that could not be used, and stops a run that has too many.

    `max_share` is judged over all samples once there are 200. `max_in_row` counts the rows of batches without a single
    good sample, one after another.
    """

    def __init__(self, max_share: float, max_in_row: int):
        self.max_share, self.max_in_row = max_share, max_in_row
        self.reasons: Counter[str] = Counter()
        self.rows = self.in_row = 0

    def add(self, reasons: Counter[str], rows: int) -> None:
        """Count a global batch of `rows` rows. ValueError: a limit is passed; the commonest reasons are named."""
        self.reasons.update(reasons)
        self.rows += rows
        self.in_row = self.in_row + rows if reasons.total() == rows else 0
        bad = self.reasons.total()
        limits = []
        if self.rows >= JUDGED_FROM and bad > self.max_share * self.rows:
            limits.append(f"max_bad_share is {self.max_share:.2%}")
        if self.in_row > self.max_in_row:
            limits.append(f"max_bad_in_row is {self.max_in_row:,}, the last {self.in_row:,} were all bad")
        if limits:
            named = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common(5))
            raise ValueError(
                f"{bad:,} of {self.rows:,} samples could not be used: {named}; {' and '.join(limits)}; find them with "
                "`mvpretrain shards check`, pack without them, or raise the limit"
            )


def as_read(read: Any) -> Any:
    return read


def end_by_parent_alone(worker: int) -> None:
    """In a worker: take SIGTERM from the training process alone, since launchers and schedulers signal every process.

    Only `sigwaitinfo` says who sent a signal, and it needs a thread that waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()

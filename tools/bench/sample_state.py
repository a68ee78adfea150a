"""Sample state: bytes an id and lookups a second, its ids divided among ranks, against a dense array on every rank.

    python -m tools.bench.sample_state                     # an eighth of 100 million ids, SogCLR's two numbers each
    python -m tools.bench.sample_state --ids 1000000 --ranks 2  # real gloo ranks that read and write whole batches

A step reads the batch's numbers and writes new ones. The other side is what FastCLIP's code keeps: one array for the
whole data set on every rank, indexed by a number below a declared size. Memory is the tables' own; `peak` is what the
process took above its start, the doubling of the table included. Ratios are ours over theirs, a rank.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.distributed.sample_state import SampleState

STEPS = 20


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stepped(step: Callable[[Tensor], None], batches: list[Tensor]) -> float:
    """Median seconds of a step, after one that does not count."""
    times = []
    for ids in batches:
        begin = time.perf_counter()
        step(ids)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def run(rank: int, options: argparse.Namespace, folder: str) -> None:
    collectives: Collectives = SingleProcess()
    if options.ranks > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
        collectives = ProcessGroup()
    make = torch.Generator().manual_seed(0)
    before, store, like = peak(), SampleState(options.columns, collectives), torch.zeros(1)

    def ours(ids: Tensor) -> None:
        rows = store.read(ids, like)
        store.write(ids, rows.nan_to_num(nan=0.0) + 1)
        store.commit()

    begin = time.perf_counter()
    for ids in torch.arange(options.ids).mul(0x5DEECE66D).split(2**20):  # spread over all numbers, each once
        ours(ids)
    filled = time.perf_counter() - begin
    table: Any = store.table
    taken, most = table.nbytes, peak() - before
    asked = [torch.randint(options.ids, (options.batch,), generator=make) for _ in range(STEPS + 1)]
    seconds = stepped(ours, [ids * 0x5DEECE66D for ids in asked])
    dense = torch.zeros(options.ids, options.columns)

    def theirs(ids: Tensor) -> None:
        dense[ids] = dense[ids] + 1

    array = stepped(theirs, asked)
    if rank == 0:
        own = len(table)
        where = f"{options.ranks} rank(s), batches of {options.batch:,}"
        print(f"{options.ids:,} ids, {options.columns} numbers each, {where}")
        print(f"{'':14}{'bytes an id, a rank':>22}{'MiB a rank':>14}{'ms a step':>12}{'ids/s':>16}")
        for name, size, took in (("ours", taken, seconds), ("dense array", dense.nbytes, array)):
            per, mib, rate = size / options.ids, size / 2**20, options.batch / took
            print(f"{name:14}{per:22.1f}{mib:14,.0f}{1000 * took:12.2f}{rate:16,.0f}")
        print(f"{'ratio':14}{taken / dense.nbytes:22.2f}{'':14}{seconds / array:12.2f}")
        print(
            f"this rank holds {own:,} ids, {taken / own:.1f} bytes each; peak {most / 2**20:,.0f} MiB above its start"
        )
        print(f"filled at {options.ids / filled:,.0f} ids/s")
    if options.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=12_500_000, help="of all ranks (12,500,000)")
    parser.add_argument("--columns", type=int, default=2, help="numbers an id (2)")
    parser.add_argument("--batch", type=int, default=32_768, help="ids a step, of all ranks (32,768)")
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes (1)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.ranks == 1:
            run(0, options, folder)
        else:
            mp.spawn(run, (options, folder), options.ranks)


if __name__ == "__main__":
    main()

"""InfoNCE, loss and gradient: ours against torch's logits and open_clip's losses, on the same rows, in one go.

    python -m tools.bench.infonce                        # n = 32,768, d = 512: one rank, two ranks, four views
    python -m tools.bench.infonce --rows 8192 --repeats 5

Every side runs in processes of its own, in turn. Time: median over the repeats after one warm-up. Memory: the peak of
the process above what it held before loss and gradient. Ratios are ours over theirs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mvpretrain import objectives
from mvpretrain.distributed.collectives import ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.types import Embeddings
from tools.bench.child import Memory, answer, ask

SIDES = {
    "one rank": ("ours", "torch logits", "open_clip"),
    "two ranks": ("ours", "open_clip local"),
    "four views": ("ours", "six torch losses", "six open_clip losses"),
}
TAU = 0.07


def tables(rows: int, dim: int, views: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
    common = torch.randn(rows, dim, generator=make)
    return [
        normalize(common + 2 * torch.randn(rows, dim, generator=make), dim=1).requires_grad_() for _ in range(views)
    ]


def ours(z: list[Tensor]) -> Callable[[], Tensor]:
    collectives = ProcessGroup() if dist.is_initialized() else SingleProcess()
    names = [f"view{i}" for i in range(len(z))]
    objective = objectives.build({"kind": "infonce", "temperature": {"init": TAU}}, names, collectives)
    b = len(z[0])
    present = torch.ones(b, dtype=torch.bool)
    ids = torch.arange(b) + b * collectives.rank
    local = Embeddings(dict(zip(names, z)), ids, dict.fromkeys(names, present), ids)
    return lambda: objective(*gather_embeddings(local, collectives)).total


def torch_logits(z: list[Tensor]) -> Callable[[], Tensor]:
    scale, labels = torch.tensor(1 / TAU, requires_grad=True), torch.arange(len(z[0]))

    def pair(a: Tensor, b: Tensor) -> Tensor:
        logits = scale * a @ b.T
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    return lambda: mean_of_pairs(pair, z)


def open_clip_loss(z: list[Tensor], local: bool = False) -> Callable[[], Tensor]:
    from open_clip.loss import ClipLoss

    scale = torch.tensor(1 / TAU, requires_grad=True)
    size, rank = (dist.get_world_size(), dist.get_rank()) if local else (1, 0)
    loss = ClipLoss(local_loss=local, gather_with_grad=local, cache_labels=True, rank=rank, world_size=size)
    return lambda: mean_of_pairs(lambda a, b: loss(a, b, scale), z)


def mean_of_pairs(pair: Callable[[Tensor, Tensor], Tensor], z: list[Tensor]) -> Tensor:
    """Each pair's loss goes backward on its own, so that their tables of logits need not be there together."""
    pairs, total = list(combinations(z, 2)), torch.zeros(())
    for a, b in pairs:
        loss = pair(a, b) / len(pairs)
        if len(pairs) > 1:
            loss.backward()
            loss = loss.detach()
        total = total + loss
    return total


def child(side: str, rows: int, dim: int, views: int, repeats: int) -> NoReturn:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if ranks > 1:
        dist.init_process_group("gloo")
    z = tables(rows // ranks, dim, views)
    make = {
        "ours": ours,
        "torch logits": torch_logits,
        "six torch losses": torch_logits,
        "open_clip": open_clip_loss,
        "six open_clip losses": open_clip_loss,
        "open_clip local": lambda z: open_clip_loss(z, local=True),
    }[side]
    loss = make(z)
    memory, times, value = Memory(torch.device("cpu")), [], float("nan")
    for _ in range(repeats + 1):
        for x in z:
            x.grad = None
        if ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        total = loss()
        if total.requires_grad:
            total.backward()
        times.append(time.perf_counter() - start)
        value = float(total)
    mib = memory.peak() / 2**20
    norm = float(torch.stack([x.grad.norm() for x in z if x.grad is not None]).norm())
    answer((statistics.median(times[1:]), mib, value, norm))


def measured(case: str, side: str, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """(seconds, MiB, loss, gradient's norm) of one side."""
    views = 4 if case == "four views" else 2
    rows = options.rows // 4 if case == "four views" else options.rows
    own = ["--child", side, "--rows", str(rows), "--dim", str(options.dim)]
    own += ["--views", str(views), "--repeats", str(options.repeats)]
    return tuple(ask("tools.bench.infonce", own, ranks=2 if case == "two ranks" else 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768, help="of the global batch; four views take a quarter")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--case", choices=SIDES, help="only this one")
    parser.add_argument("--views", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.child, options.rows, options.dim, options.views, options.repeats)
    for case, sides in SIDES.items():
        if options.case and case != options.case:
            continue
        found = {side: measured(case, side, options) for side in sides}
        rows = options.rows // (4 if case == "four views" else 1)
        print(f"\n{case}: n = {rows:,}, d = {options.dim}", flush=True)
        print(f"{'':22}{'seconds':>10}{'MiB':>10}{'loss':>12}{'gradient':>12}{'time':>8}{'memory':>9}")
        own = found["ours"]
        for side, (seconds, mib, loss, norm) in found.items():
            ratio = f"{own[0] / seconds:8.2f}{own[1] / mib:9.3f}" if side != "ours" else ""
            print(f"{side:22}{seconds:10.2f}{mib:10.0f}{loss:12.6f}{norm:12.3e}{ratio}", flush=True)


if __name__ == "__main__":
    main()

"""Bytes, multiplications and the machine's rates as they are: what `bench` reports and the memory planner reads."""

from __future__ import annotations

import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mvpretrain.engine.step import DTYPES, autocast
from mvpretrain.model.task import Task
from mvpretrain.types import Batch

UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for end, base in (("ib", 1024), ("b", 1000), ("", 1024))
}
FEW = (4, 8)  # rows on which towers are run to predict what many take
SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices by which the matrix rate is measured


def parse_bytes(text: str) -> int:
    """Bytes of "40GiB", "500 MB" or "1e9". ValueError: anything else, or nothing at all."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write it as 40GiB, 800MiB or 24GB")
    return int(float(found[1]) * UNITS[found[2]])


def format_bytes(count: float) -> str:
    """Bytes in MiB, from 10 GiB on in GiB."""
    return f"{count / 2**30:,.1f} GiB" if abs(count) >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would do, but for that a process starts with its parent's maximum.
        return 1024 * int(re.findall(rf"^{field}:\s+(\d+)", status.read_text(), re.MULTILINE)[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(device: torch.device, local: int) -> int:
    """Bytes that one of the `local` ranks of this machine may use: its GPU, or its part of the memory left."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    info = Path("/proc/meminfo")
    if info.exists():
        free = 1024 * int(re.findall(r"^MemAvailable:\s+(\d+)", info.read_text(), re.MULTILINE)[0])
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may be allowed less than its machine has
    if limit.exists() and limit.read_text().strip().isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        free = min(free, int(limit.read_text()) - (int(used.read_text()) if used.exists() else 0))
    return max(free, 0) // local


class Moment(NamedTuple):
    """What is alive after one operation, in bytes."""

    live: int  # storages that were born under `Live` and are not dead yet, gradients of parameters included
    gradients: int  # of parameters


class Live(TorchDispatchMode):
    """The bytes of all tensors that are born inside it, operation by operation, the backward's included.

    A storage counts from the operation that returns it to its last reference's end, so that what autograd saves is in
    it, and what activation checkpointing throws away is not. What a kernel takes and gives back inside is unseen.
    """

    def __init__(self, device: torch.device, module: nn.Module):
        super().__init__()
        self.device, self.live, self.gradients = device, 0, 0
        self.curve: list[Moment] = []
        self._known: set[int] = set()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._gradient) for p in module.parameters() if p.requires_grad
        ]
        self._counted = {id(p) for p in module.parameters() if p.grad is not None}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.curve.append(Moment(self.live, self.gradients))
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {s._cdata for s in self._storages((args, kwargs))}
        for storage in self._storages(out):
            if storage._cdata not in self._known and storage._cdata not in given:
                self._born(storage)
        self.curve.append(Moment(self.live, self.gradients))
        return out

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and x.device.type == self.device.type and x.layout == torch.strided:
                yield x.untyped_storage()

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += count
        weakref.finalize(storage, self._dead, key, count)

    def _dead(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count

    def _gradient(self, parameter: Tensor) -> None:
        if id(parameter) not in self._counted:
            self._counted.add(id(parameter))
            self.gradients += parameter.numel() * parameter.element_size()


def stretched(few: list[Moment], more: list[Moment], rows: tuple[int, int], wanted: int) -> list[Moment]:
    """The curve for `wanted` rows from those of two smaller numbers of `rows`.

    Each operation's bytes are a constant and a multiple of the rows. Where the two curves are not of the same
    operations, only their highest points are stretched.
    """
    if rows[0] == rows[1]:
        return more
    if len(few) != len(more):
        few, more = [max(few)], [max(more)]
    factor = (wanted - rows[0]) / (rows[1] - rows[0])
    return [
        Moment(*(max(round(a + factor * (b - a)), 0) for a, b in zip(one, two, strict=True)))
        for one, two in zip(few, more, strict=True)
    ]


class Passes(NamedTuple):
    """The towers' forward and backward on two small numbers of rows: what lives after each operation."""

    rows: tuple[int, int]
    forward: tuple[list[Moment], list[Moment]]
    backward: tuple[list[Moment], list[Moment]]
    again: tuple[list[Moment], list[Moment]]  # the backward where every parameter has its gradient already
    item: int  # bytes of one row of a batch

    def at(self, rows: int) -> tuple[list[Moment], list[Moment], list[Moment]]:
        """The three curves for any number of rows."""
        forward, backward, again = (
            stretched(*curves, self.rows, rows) for curves in (self.forward, self.backward, self.again)
        )
        return forward, backward, again


def passes(task: Task, batch: Batch, device: torch.device, precision: str) -> Passes:
    """Run the towers forth and back on the first rows of a batch. Their gradients are gone afterwards."""
    task.to(device).train()
    few, more = (min(n, len(batch.ids)) for n in FEW)
    curves = []
    for rows in (few, more):
        piece = batch.rows(slice(rows)).to(device)
        first = one_pass(task, piece, precision)
        curves.append((*first, one_pass(task, piece, precision)[1]))
        task.zero_grad()
    forward, backward, again = zip(*curves)
    return Passes((few, more), forward, backward, again, byte_count(batch) // len(batch.ids))


def one_pass(task: Task, piece: Batch, precision: str) -> tuple[list[Moment], list[Moment]]:
    """What lives after each operation of the towers' forward, and of their backward."""
    device = piece.ids.device
    with torch.compiler.set_stance("force_eager"), Live(device, task) as live:
        with autocast(device, precision):
            z = task.encode(piece).z
        ended = len(live.curve)
        wanted = [x for x in z.values() if x.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    return live.curve[:ended], live.curve[ended:]


def byte_count(tree: object) -> int:
    """Bytes of all tensors in nested tuples and mappings."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple) else ()
    return sum(byte_count(part) for part in parts)


class Flops(TorchDispatchMode):
    """Counts multiplications and additions as torch's formulas say: matrix products, convolutions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    # torch's own FlopCounterMode also counts by module, with hooks that do not allow GradCache's autograd.grad.
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        # addmm_ and the like, which write in place, are not in torch's table, but those that do not are.
        name = function.__name__.partition(".")[0].removesuffix("_")
        formula = flop_registry.get(getattr(torch.ops.aten, name, None))
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of one call. Triton's kernels are unseen; what is done twice (checkpointing, GradCache) counts twice."""
    with torch.compiler.set_stance("force_eager"), Flops() as counter:
        run()
    return counter.total


def matrix_rate(device: torch.device, precision: str, seconds: float = 0.5) -> float:
    """FLOP/s of a large square matrix product in this precision: the best of those that fit into some seconds."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    out, best, end = torch.empty_like(a), float("inf"), time.perf_counter() + seconds
    for turn in range(1000):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - begin
        best = min(best, took) if turn else best  # the first one also starts the library
        if turn and time.perf_counter() > end:
            break
    return 2 * side**3 / best

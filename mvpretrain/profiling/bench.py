"""Where the time and the memory of a recipe's steps go: `mvpretrain bench RECIPE`, and micro-batches by trial."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from mvpretrain.data.build import count_samples
from mvpretrain.engine import Engine, World, resolve, start
from mvpretrain.engine.schedule import set_rate
from mvpretrain.model.phase_timer import PHASES
from mvpretrain.profiling import measure
from mvpretrain.profiling.measure import format_bytes
from mvpretrain.recipe import Recipe
from mvpretrain.training.train import build_engine
from mvpretrain.types import Batch

TRACED = 3  # steps in a profiler trace: a trace of all would take gigabytes
OUT_OF_MEMORY = 4  # exit code of the program where the GPU's memory ended


class Bench(NamedTuple):
    """What some steps of a recipe took, on all ranks."""

    engine: str
    device: str
    precision: str
    ranks: int
    batch: int  # global
    steps: int  # that were timed
    milliseconds: dict[str, float]  # a step by phase and the rest, means over steps and ranks
    step: float  # milliseconds, the median over steps of the slowest rank
    samples: float  # a second, by the median step
    peaks: list[int]  # bytes by rank: tensors on GPUs, the process on CPUs
    baseline: int  # bytes of rank 0's process before there was a model, for CPUs
    flops: int  # of one rank's step
    rate: float  # FLOP/s of a large matrix product on rank 0 while all ranks do one

    @property
    def utilization(self) -> float:
        """FLOP/s of a step over those of the matrix product."""
        return self.flops / (self.step / 1000) / self.rate


def bench(recipe: Recipe, steps: int, warmup: int, profile: Path | None = None) -> Bench | None:
    """Run real steps of a recipe, on as many ranks as the launcher started, and write nothing to its folder.

    Rank 0 gets the figures, the others None. `profile` is a folder for a trace of a few more steps, one file a rank,
    for chrome://tracing or Perfetto. ValueError: whatever stops the run itself; fewer than one step.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(f"--steps {steps} --warmup {warmup}: time at least 1 step, after 0 or more that do not count")
    resolved = resolve(recipe.engine)
    stream = recipe.stream("train", resolved.rank, resolved.size)
    assert stream is not None
    world = start(resolved)
    baseline = measure.resident()
    engine = build_engine(recipe, world)
    set_rate(engine.optimizer, recipe.schedule.factor(0, recipe.total_steps(count_samples(stream.sources))))
    batches = (batch for batch, _, _ in stream.batches(stream.start()))
    for _ in range(warmup):
        engine.step(next(batches))
    engine.phase_timer.figures()
    seconds, stepped = zip(*(timed(engine, batches) for _ in range(steps)))
    if not any(stepped):
        raise FloatingPointError(
            f"no loss or gradient of {steps} steps was finite, so that nothing was timed; lower optimizer.lr="
            f"{recipe.optimizer.lr}"
        )
    phases, peak = engine.phase_timer.figures(), measure.peak(world.device)
    if profile:
        trace(engine, batches, profile)
    last = next(batches)
    flops = measure.flops(lambda: engine.step(last))
    rate = measure.matrix_rate(world.device, world.precision)
    return over_ranks(recipe, world, seconds, phases, peak, baseline, flops, rate)


def timed(engine: Engine, batches: Iterator[Batch]) -> tuple[float, bool]:
    """(seconds of one step with its wait for data, whether anything was changed by it)."""
    begin = time.perf_counter()
    with engine.phase_timer("data"):
        batch = next(batches)
    stepped = engine.step(batch).stepped
    if engine.world.device.type == "cuda":
        torch.cuda.synchronize(engine.world.device)
    return time.perf_counter() - begin, stepped


def trace(engine: Engine, batches: Iterator[Batch], folder: Path) -> None:
    """Profile a few steps into `folder/rank-0.json` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED):
            timed(engine, batches)
    profiler.export_chrome_trace(str(folder / f"rank-{engine.world.rank}.json"))


def over_ranks(
    recipe: Recipe,
    world: World,
    seconds: Sequence[float],
    phases: dict[str, float],
    peak: int,
    baseline: int,
    flops: int,
    rate: float,
) -> Bench | None:
    """One rank's figures to those of all."""
    own = torch.tensor([*seconds, *(phases[p] for p in PHASES), peak], dtype=torch.float64, device=world.device)
    gathered = world.collectives.gather(own[None]).cpu()
    if world.rank:
        return None
    count = len(seconds)
    milliseconds = dict(zip(PHASES, gathered[:, count:-1].mean(dim=0).tolist()))
    milliseconds["rest"] = max(0.0, 1000 * float(gathered[:, :count].mean()) - sum(milliseconds.values()))
    step = median(gathered[:, :count].amax(dim=0).tolist())
    return Bench(
        engine=world.kind,
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        precision=world.precision,
        ranks=world.size,
        batch=recipe.batch,
        steps=count,
        milliseconds=milliseconds,
        step=1000 * step,
        samples=recipe.batch / step,
        peaks=[int(p) for p in gathered[:, -1].tolist()],
        baseline=baseline,
        flops=flops,
        rate=rate,
    )


def print_bench(found: Bench, console: Console) -> None:
    """The figures as a table and a few lines."""
    where = f"{found.ranks} rank(s): {found.engine}, {found.device}, {found.precision}"
    console.print(f"a step of {found.batch} samples on {where}", markup=False, highlight=False, soft_wrap=True)
    table = Table("phase")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    whole = sum(found.milliseconds.values())
    for phase, value in found.milliseconds.items():
        table.add_row(phase, f"{value:.2f}", f"{value / whole:.1%}")
    table.add_section()
    table.add_row("mean of the steps", f"{whole:.2f}", "")
    console.print(table)
    peaks = ", ".join(format_bytes(p) for p in found.peaks)
    what = (
        "tensors on the GPU"
        if found.device != "cpu"
        else f"the process, {format_bytes(found.baseline)} before the model"
    )
    name = "MFU" if found.device != "cpu" else "share of the measured matrix rate"
    lines = (
        f"samples/s: {found.samples:,.1f} (median of {found.steps} steps: {found.step:.2f} ms)",
        f"peak memory by rank: {peaks} ({what})",
        f"FLOPs: {found.flops / 1e9:,.2f} G a step and rank, repeated ones counted; {name} {found.utilization:.1%} "
        f"of {found.rate / 1e9:,.0f} GFLOP/s",
    )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def write_json(found: Bench, path: Path) -> None:
    """The figures as JSON, for tools."""
    path.write_text(json.dumps({**found._asdict(), "utilization": found.utilization}, indent=1) + "\n")


class Trial(NamedTuple):
    """One child process that ran a few steps with some micro-batch."""

    rows: int
    peak: int | None  # bytes of the rank that had most; None where memory ended
    samples: float | None
    fits: bool


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that fits, to within an eighth, by doubling and then bisecting; 0 where none."""
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, high * 2
    if high >= most:
        if fits(most):
            return most
        high = most
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_micro_batch(recipe: Recipe, budget: int | None, console: Console) -> int:
    """The largest engine.micro_batch whose measured peak is within `budget` bytes a rank; each trial is a fresh child.

    Without a budget, a GPU's memory is the limit, and on CPUs what the machine has left. ValueError: started by a
    launcher, or not even one row fits.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--find-micro-batch starts its ranks itself; give engine.ranks=N and no launcher")
    ranks = recipe.engine.ranks or 1
    rows = recipe.batch // ranks
    device = resolve(recipe.engine.model_copy(update={"ranks": None, "kind": "auto"})).device
    if budget is None and device.type == "cpu":
        budget = measure.room(device, ranks)
    tried: list[Trial] = []

    def fits(count: int) -> bool:
        tried.append(trial(recipe, count if count < rows else None, budget))
        return tried[-1].fits

    found = largest(fits, rows)
    limit = format_bytes(budget) if budget else "the GPU"
    table = Table("micro_batch", "peak a rank", "samples/s", "", title=f"within {limit} a rank")
    for t in sorted(tried):
        peak, rate = ("-" if x is None else f(x) for x, f in ((t.peak, format_bytes), (t.samples, "{:,.1f}".format)))
        table.add_row(str(t.rows), peak, rate, "fits" if t.fits else "too large")
    console.print(table)
    if not found:
        raise ValueError(f"not even 1 row of {rows} fits into {limit} a rank; make the towers smaller")
    setting = f"engine.micro_batch={found}" if found < rows else "the whole batch fits, engine.micro_batch=null"
    console.print(f"set {setting}", markup=False, highlight=False, soft_wrap=True)
    return found


def trial(recipe: Recipe, micro_batch: int | None, budget: int | None) -> Trial:
    """Two steps with this micro-batch in a process of its own, or in several. ValueError: what the child refused."""
    ranks = recipe.engine.ranks or 1
    rows = micro_batch or recipe.batch // ranks
    setting = "engine.micro_batch=" + ("null" if micro_batch is None else str(micro_batch))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(recipe.dump())
        try:
            found = in_processes(path, [setting], ranks, steps=2, warmup=1)
        except MemoryError:
            return Trial(rows, None, None, False)
    peak = max(found["peaks"])
    return Trial(rows, peak, found["samples"], budget is None or peak <= budget)


def in_processes(recipe: Path, overrides: Sequence[str], ranks: int, steps: int, warmup: int) -> dict[str, Any]:
    """The figures that `mvpretrain bench` writes, from a fresh process, or from as many as there are ranks.

    MemoryError: one of them was killed, or got no more memory. ValueError: what they refused, or the error they met.
    """
    launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        options = ["--steps", str(steps), "--warmup", str(warmup), "--json", str(out)]
        command = [sys.executable, "-m", *launcher, "mvpretrain", "bench", str(recipe), *overrides, *options]
        # A user's own classes are found where this process has found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if out.exists():
            return json.loads(out.read_text())
    # The kernel kills a process that takes too much; a launcher reports its children's exit codes in words only.
    codes = [ended.returncode, *(int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", ended.stderr))]
    if OUT_OF_MEMORY in codes or -9 in codes:
        raise MemoryError(f"{recipe} with {', '.join(overrides)} took more memory than there is")
    said = re.findall(r"^mvpretrain.*?: (.+)", ended.stderr, re.MULTILINE)
    errors = re.findall(r"^(?:\[rank\d+\]: ?)?([\w.]+(?:Error|Exception): .+)", ended.stderr, re.MULTILINE)
    raise ValueError(said[0] if said else errors[-1] if errors else ended.stderr[-500:])

"""What GradCache saves and costs: the same steps on a big batch at once, and in micro-batches by two passes.

    python -m tools.bench.gradcache [--batch 256] [--parts 16] [--steps 3] [--rounds 2] [--device cpu] [--threads 1]

A ViT-S (12 blocks of width 384 and 6 heads) on 32-pixel images and a text tower of 4 blocks of width 192, InfoNCE,
AdamW. Each side runs in a fresh child process, in turns over the rounds: one step on 2 rows, which makes the
optimiser's moments, one full step to warm up, then the timed ones. Memory is the peak over the full steps above what
there was before them; on CPUs the process's resident pages (VmHWM, set back by clear_refs, less VmRSS, after
malloc_trim), on GPUs max_memory_allocated. Gradients are in it on all sides. Aims: memory at most 1/8, time at most
1.5 times.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from mvpretrain import objectives
from mvpretrain.engine import Engine, resolve, start, wrap
from mvpretrain.engine.optimizer import OptimizerConfig, build_optimizer
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.model.task import Task
from mvpretrain.model.tower import TowerConfig
from mvpretrain.types import Batch, View
from tools.bench.child import Memory, answer, ask

SIDES = ("plain", "two passes", "first in bf16")
LENGTH, DIM = 16, 128


def engine_of(side: str, options: argparse.Namespace) -> Engine:
    """The two towers under engine.kind=none, in float32."""
    settings: dict[str, Any] = {"kind": "none", "device": options.device, "precision": "fp32"}
    if side != "plain":
        settings |= {"micro_batch": -(-options.batch // options.parts), "first_pass": "same"}
    if side == "first in bf16":
        settings["first_pass"] = "bf16"
    config = EngineConfig(**settings, threads=options.threads)
    world = start(resolve(config))
    torch.manual_seed(0)
    image = {"kind": "vit", "image_size": 32, "patch": 4, "width": 384, "depth": options.depth, "heads": 6}
    text = {"kind": "transformer", "length": LENGTH, "width": 192, "depth": 4, "heads": 3}
    towers = {
        "image": TowerConfig.model_validate({"encoder": image}),
        "text": TowerConfig.model_validate({"encoder": text}),
    }
    objective = objectives.build({"kind": "infonce"}, ["image", "text"], world.collectives)
    task = Task({"image": "image", "text": "text"}, towers, DIM, objective, world.collectives).to(world.device)
    optimizer = build_optimizer(task, towers, OptimizerConfig(kind="adamw", lr=1e-4))
    return wrap(world, task, optimizer, config, options.batch)


def batch_of(rows: int) -> Batch:
    views = {"image": View(torch.randn(rows, 3, 32, 32)), "text": View(torch.randint(259, (rows, LENGTH)))}
    present = dict.fromkeys(views, torch.ones(rows, dtype=torch.bool))
    return Batch(views, torch.arange(rows), present, torch.full((rows,), -1))


def measured(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    engine = engine_of(side, options)
    device = engine.world.device
    batch = batch_of(options.batch)
    engine.step(batch_of(2))
    memory = Memory(device)
    seconds = []
    for step in range(options.steps + 1):
        begin = time.perf_counter()
        done = engine.step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        if step == 0:
            engine.phase_timer.figures()
        assert done.stepped
    return {"seconds": seconds[1:], "peak": memory.peak(), "phases": engine.phase_timer.figures()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    if options.side:
        answer(measured(options.side, options))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(ask("tools.bench.gradcache", [*given, "--side", side]))
    report(found, options)


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    seconds = {side: median(s for run in runs for s in run["seconds"]) for side, runs in found.items()}
    peaks = {side: median(run["peak"] for run in runs) for side, runs in found.items()}
    print(f"batch {options.batch}, {options.parts} parts, {options.device}, {options.threads} thread(s)")
    print(f"{'':>14} {'samples/s':>10} {'time':>7} {'peak MiB':>9} {'memory':>7}   ms by phase")
    for side, runs in found.items():
        phases = "  ".join(f"{name} {value:.0f}" for name, value in runs[-1]["phases"].items() if value >= 1)
        time_ratio, memory_ratio = seconds[side] / seconds["plain"], peaks[side] / peaks["plain"]
        rate = options.batch / seconds[side]
        print(f"{side:>14} {rate:10.1f} {time_ratio:6.2f}x {peaks[side] / 2**20:9.0f} {memory_ratio:6.3f}x   {phases}")


if __name__ == "__main__":
    main()

"""Commands about a run: train it, or say where the time of its steps goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mvpretrain.cli.arguments import Memory, Overrides, RecipePath, Trust
from mvpretrain.cli.terminal import console, print_text

app = typer.Typer()


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what the run would be and take in memory, then stop")
    ] = False,
    memory: Memory = None,
    file: Annotated[Path | None, typer.Option("--json", help="a file for the dry run's memory figures")] = None,
    trust: Trust = False,
) -> None:
    """Train: in one process, or on several started by torchrun, accelerate launch or deepspeed."""
    from mvpretrain.recipe import load

    settings = load(recipe, overrides or (), trust)
    if dry_run:
        from mvpretrain.profiling.dry_run import print_dry_run
        from mvpretrain.profiling.measure import parse_bytes
        from mvpretrain.training.train import checkpoint_to_resume

        checkpoint_to_resume(settings, resume)
        plan = print_dry_run(settings, console, parse_bytes(memory) if memory else None)
        if file:
            file.write_text(json.dumps({**plan._asdict(), "peak": plan.peak}, indent=1) + "\n")
        return None
    if memory or file:
        raise ValueError("--memory and --json are about --dry-run; add that, or leave them out")
    from mvpretrain.engine import shutdown
    from mvpretrain.training.loop import PREEMPTED, Preempted
    from mvpretrain.training.train import train

    try:
        run = train(settings, resume, trust)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print_text(str(stop))
        return shutdown(PREEMPTED)
    if os.environ.get("RANK", "0") == "0":
        print_text(f"done: {run}")
    return shutdown(0)


@app.command()
def bench(
    recipe: RecipePath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="steps that are timed")] = 20,
    warmup: Annotated[int, typer.Option(help="steps before them")] = 3,
    profile: Annotated[Path | None, typer.Option(help="folder for a profiler's trace of some more steps")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="a file for the figures")] = None,
    find_micro_batch: Annotated[
        bool, typer.Option("--find-micro-batch", help="the largest engine.micro_batch that fits, by trial")
    ] = False,
    memory: Memory = None,
    trust: Trust = False,
) -> None:
    """Where the time and memory of a recipe's real steps go; under any launcher, as for `train`."""
    from mvpretrain.engine import shutdown
    from mvpretrain.profiling import bench as benchmark
    from mvpretrain.profiling.measure import parse_bytes
    from mvpretrain.recipe import load

    settings = load(recipe, overrides or (), trust)
    if find_micro_batch:
        benchmark.find_micro_batch(settings, parse_bytes(memory) if memory else None, console)
        return None
    if memory:
        raise ValueError(f"--memory {memory} is the limit for --find-micro-batch; add that, or leave it out")
    found = benchmark.bench(settings, steps, warmup, profile)
    if found:
        benchmark.print_bench(found, console)
        if file:
            benchmark.write_json(found, file)
    return shutdown(0)

"""A model of the step, fitted to runs with a few ranks here, and what it says of thousands.

    python -m tools.bench.scaling RECIPE [key.sub=value ...] [--ranks 1 2 4] [--rows 16 32] [--json FILE]
    python -m tools.bench.scaling --paper-only [--rate 4e14] [--bandwidth 5e10] [--latency 1e-5] ...

First part, measured: `mvpretrain bench` runs the recipe with the same rows a rank on 1, 2 and 4 ranks of this machine,
the model's terms are fitted to its phases, and predicted stands beside measured. More ranks than cores share them, so
that a term of computation is multiplied by ranks / cores where that is above 1.

Second part, on paper: the same terms for 8 to 4,096 GPUs under assumed rates. Nothing in it is measured. Each
objective's row says from where on the GPUs are used below one half, or its products and messages take more than half
of the step: there it stops scaling.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from mvpretrain.profiling.bench import in_processes

KINDS = ("infonce", "sogclr", "m3g")


class Work(NamedTuple):
    """One step of a rank: weak scaling keeps it, and the global batch grows with the ranks."""

    rows: int  # samples a rank
    views: int
    dim: int
    parameters: int  # trained, reduced in 4 bytes each
    flops: float = 0.0  # of the towers, forward and backward, a sample
    contractions: int = 18  # of m3g: two sweeps of its solver and five Newton steps

    @property
    def pairs(self) -> int:
        return self.views * (self.views - 1) // 2


class Machine(NamedTuple):
    """Assumed rates of one GPU and its link."""

    rate: float  # FLOP/s that the towers reach
    products: float  # FLOP/s that the objective's products reach
    bandwidth: float  # bytes/s of a rank's link in one direction
    latency: float  # seconds a message
    hidden: float  # share of the backward that hides the gradient's reduction


class Parts(NamedTuple):
    """Seconds of a step on one rank."""

    towers: float
    objective: float
    gather: float  # tables, their gradient, and state
    reduce: float  # what the backward does not hide

    @property
    def step(self) -> float:
        return sum(self)

    @property
    def efficiency(self) -> float:
        """Samples a second and rank, against a rank that had neither objective nor others."""
        return self.towers / self.step

    @property
    def stopped(self) -> bool:
        return self.efficiency < 0.5 or self.objective + self.gather > self.step / 2


def objective_flops(kind: str, work: Work, ranks: int) -> float:
    """Products of one rank, loss and gradient.

    infonce: b n d multiplications forward and 3 b n d backward a pair of views, both directions from one product.
    sogclr: twice that, since a rank also computes the columns of its own rows. m3g, three views: three products of
    n x n tables a sweep of the solver, shared over ranks, and as many again for the gradient's tables.
    """
    n = work.rows * ranks
    if kind == "m3g":
        if work.views != 3:
            raise ValueError(f"m3g's model is for three views, got {work.views}; give --views 3")
        return 2.0 * work.contractions * n**3 / ranks
    pairwise = 8.0 * work.pairs * work.rows * n * work.dim
    return 2 * pairwise if kind == "sogclr" else pairwise


def messages(kind: str, work: Work, ranks: int) -> list[float]:
    """Bytes of a step's all-gathers, besides the gradient's reduction; a reduce-scatter counts as one."""
    n = work.rows * ranks
    table = 4.0 * n * work.dim * work.views
    if kind == "sogclr":
        return [table, 8.0 * n * work.views]  # features without a gradient; estimator and temperature a row
    if kind == "m3g":
        return [table, table] + [4.0 * n] * (2 * work.views + 200)  # a marginal an update, and a product of the Hessian
    return [table, table] + [4.0 * n] * (4 * work.pairs)  # sums over columns, merged over ranks


def all_gather(size: float, ranks: int, machine: Machine) -> float:
    """Seconds; every rank ends with `size` bytes, of which it had one part."""
    return machine.latency * math.log2(ranks) + size * (ranks - 1) / ranks / machine.bandwidth


def parts(kind: str, work: Work, ranks: int, machine: Machine) -> Parts:
    """The model of the step."""
    towers = work.rows * work.flops / machine.rate
    # The all-reduce is a reduce-scatter and an all-gather of all gradients.
    reduction = 2 * all_gather(4.0 * work.parameters, ranks, machine)
    return Parts(
        towers,
        objective_flops(kind, work, ranks) / machine.products,
        sum(all_gather(size, ranks, machine) for size in messages(kind, work, ranks)) if ranks > 1 else 0.0,
        max(0.0, reduction - machine.hidden * towers * 2 / 3),  # the backward is two thirds of the towers' work
    )


def held(kind: str, work: Work, ranks: int) -> float:
    """Bytes of a rank's tables: gathered embeddings with their gradient, for m3g four n x n / ranks tables a pair."""
    n = work.rows * ranks
    table = 8.0 * n * work.dim * work.views
    return table + 16.0 * work.pairs * n * n / ranks if kind == "m3g" else table


def limit(kind: str, work: Work, machine: Machine, sizes: Sequence[int]) -> int | None:
    """The first of these numbers of ranks at which an objective does not scale any more."""
    return next((w for w in sizes if parts(kind, work, w, machine).stopped), None)


class Run(NamedTuple):
    """One measured run: milliseconds by phase, as `mvpretrain bench` says them."""

    ranks: int
    rows: int
    milliseconds: dict[str, float]


def terms(run: Run, work: Work, kind: str, cores: int) -> dict[str, dict[str, float]]:
    """Phase -> term -> its size in this run: what the fitted coefficients multiply."""
    here = work._replace(rows=run.rows)
    crowded = max(1.0, run.ranks / cores)
    single = run.ranks == 1
    gathered = 0.0 if single else sum(messages(kind, here, run.ranks)[:1]) * (run.ranks - 1) / run.ranks
    reduced = 8.0 * work.parameters * (run.ranks - 1) / run.ranks
    return {
        "data": {"a row": run.rows * crowded},
        "encode": {"a row": run.rows * crowded},
        "gather": {"a message": 0.0 if single else run.ranks - 1.0, "a byte": gathered},
        "objective": {
            "a step": crowded,
            "a FLOP": objective_flops(kind, here, run.ranks) * crowded,
            "a message": 0.0 if single else run.ranks - 1.0,
        },
        "backward": {"a row": run.rows * crowded, "a reduced byte": reduced},
        "optimizer": {"a step": crowded},
        "rest": {"a step": crowded},
    }


Fit = dict[str, dict[str, float]]  # phase -> term -> milliseconds each


def fitted(runs: Sequence[Run], describe: Callable[[Run], dict[str, dict[str, float]]]) -> Fit:
    """Non-negative least squares, phase by phase, in relative errors."""
    found: Fit = {}
    for phase in describe(runs[0]):
        names = list(describe(runs[0])[phase])
        table = np.array([[describe(run)[phase][name] for name in names] for run in runs])
        seen = np.array([run.milliseconds[phase] for run in runs])
        # Neither tiny phases nor terms of very different size should decide by their units.
        weight = 1 / np.maximum(seen, 0.01 * seen.max() + 1e-9)
        size = np.abs(table).max(axis=0) + 1e-30
        solution, _ = nnls(table / size * weight[:, None], seen * weight)
        found[phase] = dict(zip(names, (solution / size).tolist()))
    return found


def predicted(fit: Fit, sizes: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds by phase."""
    return {phase: sum(fit[phase][name] * size for name, size in own.items()) for phase, own in sizes.items()}


def work_of(recipe: Path, overrides: list[str]) -> tuple[str, Work]:
    """(kind of the objective, the work of a step) of a recipe."""
    from mvpretrain.distributed.collectives import SingleProcess
    from mvpretrain.recipe import load

    settings = load(recipe, overrides)
    trained = sum(p.numel() for p in settings.task(SingleProcess()).parameters() if p.requires_grad)
    kind = settings.objective.kind
    if kind not in KINDS:
        raise SystemExit(f"objective kind {kind!r} has no model here; its known kinds are {', '.join(KINDS)}")
    return kind, Work(0, len(settings.views), settings.row_dim(), trained)


def show_fit(args: argparse.Namespace) -> list[Run]:
    """Measure, fit, print predicted beside measured."""
    cores = os.cpu_count() or 1
    kind, work = work_of(args.recipe, args.overrides)
    runs = []
    for ranks in args.ranks:
        for rows in args.rows:
            settings = [*args.overrides, f"batch={rows * ranks}", "engine.threads=1", "engine.ranks=null"]
            found = in_processes(args.recipe, settings, ranks, steps=6, warmup=2)
            runs.append(Run(ranks, rows, found["milliseconds"]))
    fit = fitted(runs, lambda run: terms(run, work, kind, cores))
    print(f"# measured on {cores} CPU cores, 1 thread a rank; {kind}, {work.parameters:,} parameters, d {work.dim}")
    print(f"{'ranks':>5}{'rows':>6}  {'milliseconds, measured / predicted, by phase'}")
    for run in runs:
        guess = predicted(fit, terms(run, work, kind, cores))
        pairs = "  ".join(f"{p} {run.milliseconds[p]:.1f}/{guess[p]:.1f}" for p in guess)
        seen, wanted = sum(run.milliseconds.values()), sum(guess.values())
        print(f"{run.ranks:5}{run.rows:6}  step {seen:.0f}/{wanted:.0f} ({wanted / seen - 1:+.0%})  {pairs}")
    for phase, own in fit.items():
        print(f"  {phase}: " + ", ".join(f"{value:.3g} ms {name}" for name, value in own.items()))
    return runs


def show_paper(work: Work, machine: Machine) -> None:
    """The table for thousands of GPUs."""
    sizes = [2**i for i in range(3, 13)]
    print(
        f"\n# on paper, nothing measured: {work.rows} rows a GPU, {work.flops / 1e9:.0f} GFLOP a sample, d {work.dim}, "
    )
    print(
        f"# {work.parameters / 1e6:.0f} M parameters; assumed: towers at {machine.rate / 1e12:.0f} TFLOP/s, objective "
        f"at {machine.products / 1e12:.0f},\n# link {machine.bandwidth / 1e9:.0f} GB/s, {machine.latency * 1e6:.0f} us "
        f"a message, reduction hidden by {machine.hidden:.0%} of the backward"
    )
    for kind in KINDS:
        here = work._replace(views=3) if kind == "m3g" else work
        print(
            f"\n{kind}, {here.views} views\n{'GPUs':>6}{'batch':>11}{'towers':>9}{'objective':>11}{'gather':>9}", end=""
        )
        print(f"{'reduce':>9}{'step ms':>10}{'efficiency':>12}{'tables':>12}")
        for ranks in sizes:
            p = parts(kind, here, ranks, machine)
            row = "".join(f"{1000 * x:{w}.1f}" for x, w in zip((*p, p.step), (9, 11, 9, 9, 10)))
            memory = f"{held(kind, here, ranks) / 2**30:8.1f} GiB"
            print(f"{ranks:6}{here.rows * ranks:11,}{row}{p.efficiency:12.0%}{memory}{'  stops' * p.stopped}")
        found = limit(kind, here, machine, sizes)
        print(f"{kind} stops scaling at {found} GPUs" if found else f"{kind} scales to {sizes[-1]} GPUs and beyond")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32], help="a rank, of the measured runs")
    parser.add_argument("--json", type=Path, help="a file for the measured runs")
    parser.add_argument("--paper-only", action="store_true")
    paper = parser.add_argument_group("assumptions of the second part, about an H100 with 400 Gbit/s and ViT-B/32 CLIP")
    paper.add_argument("--rate", type=float, default=4e14, help="FLOP/s of the towers (%(default)g)")
    paper.add_argument("--products", type=float, default=4e14, help="FLOP/s of the objective (%(default)g)")
    paper.add_argument("--bandwidth", type=float, default=5e10, help="bytes/s of a GPU's link (%(default)g)")
    paper.add_argument("--latency", type=float, default=1e-5, help="seconds a message (%(default)g)")
    paper.add_argument("--hidden", type=float, default=1.0, help="share of the backward that hides the reduction")
    paper.add_argument("--flops", type=float, default=4.4e10, help="of the towers, a sample (%(default)g)")
    paper.add_argument("--parameters", type=int, default=151_000_000)
    paper.add_argument("--per-gpu", type=int, default=512, help="samples a GPU (%(default)s)")
    paper.add_argument("--dim", type=int, default=512)
    paper.add_argument("--views", type=int, default=2)
    args = parser.parse_args(argv)
    if not args.recipe and not args.paper_only:
        parser.error("give a recipe to measure, or --paper-only")
    if not args.paper_only:
        runs = show_fit(args)
        if args.json:
            args.json.write_text(json.dumps([run._asdict() for run in runs], indent=1) + "\n")
    work = Work(args.per_gpu, args.views, args.dim, args.parameters, args.flops)
    show_paper(work, Machine(args.rate, args.products, args.bandwidth, args.latency, args.hidden))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

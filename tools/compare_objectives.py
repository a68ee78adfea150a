"""Objectives for k views side by side on real data: equal towers, batches, steps and optimiser; a table and a plot.

    python tools/compare_objectives.py --out runs/objectives                    # every data set and objective, 3 seeds
    python tools/compare_objectives.py --out runs/objectives --jobs 2           # two runs at once, one core each
    python tools/compare_objectives.py --out OTHER --data mfeat --objectives m3g infonce --seeds 1 --steps 20

Writes OUT/comparison.{md,json,png}. A run is a process of its own and leaves OUT/results/NAME.json when it is finished;
started again, the command goes on with those that are missing, also with more seeds or objectives. SOURCES holds the
folders mfeat, mnist, fsdd and cifar10_jpg, as tools/make_*.py read them; a data set that is not there is left out.

Scores are on held-out data. Linear probes read the encoders' features before the head, from 10 and 50 labelled samples
a class (mean of three draws) and from all; with several encoders, the mean over views. Retrieval is R@1 in the shared
space: over all ordered pairs of views; and of each view from all of the others, fused as their normalised mean or as
their product coordinate by coordinate. `untrained` is the same towers as they start.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from objectives_report import write
from objectives_run import DATA, OBJECTIVES, ROOT, Case, Options, finished, run, settings

from mvpretrain import objectives


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="NAME", help=f"of {[*DATA]}")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        metavar="NAME",
        help=f"of {[*OBJECTIVES]}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each (3)")
    parser.add_argument("--steps", type=int, help="for all data sets, instead of their own")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/objectives"), help="shards, runs, results (runs/objectives)"
    )
    parser.add_argument("--sources", type=Path, default=ROOT.parent / "shared/data", help="the folder of the data sets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def prepare(name: str, out: Path, sources: Path) -> bool:
    """The shards of a data set in OUT/data, made where they are not there; whether they can be had."""
    data = DATA[name]
    folder = out / "data" / data.make
    paths = [sources / source for source in data.sources]
    if folder.exists():
        return True
    for path in paths:
        if not path.exists():
            print(f"{name} is left out: there is no {path}; give its folder by --sources")
            return False
    importlib.import_module(f"make_{data.make}").main([*map(str, paths), str(folder)])
    return True


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All runs that can be had, seed by seed, so that an early table has every row."""
    data = [name for name in options.data if prepare(name, options.out, options.sources)]
    known = objectives.door.kinds()
    chosen = []
    for name in options.objectives:
        setting = OBJECTIVES[name]
        if setting is None or setting["kind"] in known:
            chosen.append(name)
        else:
            print(f"{name} is left out: there is no objective of kind {setting['kind']!r}")
    for name in data:
        print(f"{name}: {' '.join(settings(Case(name, 'untrained', 0), options.steps)[:-1])}")
    for seed in range(options.seeds):
        for name in data:
            yield from (Case(name, objective, seed) for objective in chosen if objective not in DATA[name].without)


def start(case: Case, options: argparse.Namespace) -> bool:
    """One run in a process of its own; whether it finished."""
    own = ["--out", str(options.out), "--threads", str(options.threads), "--child", *map(str, case)]
    own += ["--steps", str(options.steps)] if options.steps else []
    path = options.out / "results" / f"{case.name}.log"
    begin = time.perf_counter()
    with path.open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        code = subprocess.run([sys.executable, __file__, *own], stdout=log, stderr=log, env=environment).returncode
    took = time.perf_counter() - begin
    if code:
        last = path.read_text().strip().rpartition("\n")[2]
        print(f"{case.name} failed after {took:.0f} s: {last} ({path})", flush=True)
    else:
        print(f"{case.name}: {took:.0f} s", flush=True)
    return not code


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    shared = Options(options.out, options.steps, options.threads)
    if options.child:
        data, objective, seed = options.child
        run(Case(data, objective, int(seed)), shared)
        return 0
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    wanted = list(cases(options))
    missing = [case for case in wanted if finished(case, shared) is None]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them finished before", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        good = all(list(pool.map(lambda case: start(case, options), missing)))
    results = [result for case in wanted if (result := finished(case, shared))]
    if results:
        write(options.out, results, about(argv, options))
    return 0 if good and results else 1


def about(argv: Sequence[str] | None, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know to repeat the table."""
    given = sys.argv[1:] if argv is None else list(argv)
    return {
        "command": shlex.join(["python", "tools/compare_objectives.py", *given]),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"CPU with {os.cpu_count()} cores; runs at once: {options.jobs}, threads of each: {options.threads}",
    }


if __name__ == "__main__":
    raise SystemExit(main())

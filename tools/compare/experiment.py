"""What objectives.py and tailed.py have alike: cases, one process a run, results to go on from."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mvpretrain
from mvpretrain import engine as engines
from mvpretrain import objectives
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.files import write_text
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.training import checkpoint, train

ROOT = Path(__file__).resolve().parents[2]
Result = Mapping[str, Any]


class DataSet(NamedTuple):
    """A recipe on real data, cut down to minutes on a core."""

    make: str  # a tool of tools/data
    sources: tuple[str, ...]  # what it reads, below SOURCES
    recipe: str
    steps: int
    settings: tuple[str, ...]  # that differ from the recipe's
    probed: tuple[str, ...]  # views that a probe reads
    rows: tuple[int, int]  # the most labelled and the most held-out samples
    note: str
    augmented: bool = False  # views that differ by their augmentation alone are augmented in retrieval too
    without: tuple[str, ...] = ()  # objectives that cannot be had
    packing: tuple[str, ...] = ()  # its options
    objective: Mapping[str, Mapping[str, Any]] = {}  # kind of objective -> what is set for it on these data

    def shards(self, out: Path) -> Path:
        return out / "data" / "".join((self.make, *self.packing))


AVMNIST = DataSet(
    make="avmnist",
    sources=("mnist", "fsdd"),
    recipe="avmnist",
    steps=200,
    settings=(
        "batch=64",
        "schedule.warmup=20",
        "towers.image.encoder.width=8",
        "towers.audio.encoder={kind: series, channels: 40, strides: [2, 2], width: 64, depth: 2, heads: 2}",
        "towers.text.encoder.depth=1",
    ),
    probed=("image", "audio"),
    rows=(3000, 1000),
    note="k = 3: image, spoken digit and caption, paired by class alone.",
)


class Options(NamedTuple):
    """What all runs share."""

    out: Path
    steps: int | None  # None: the data set's own
    threads: int


class Case(NamedTuple):
    """One run of the comparison."""

    data: str
    objective: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.objective}-{self.seed}"


class Experiment(NamedTuple):
    """What is compared on which data; `measure` makes a run's figures, `write` the report from all runs' results."""

    tool: str  # the module that is started as a command, once a run
    data: Mapping[str, DataSet]
    objectives: Mapping[str, Mapping[str, Any] | None]  # None: the towers as they start
    measure: Callable[[Recipe, Task, DataSet], dict[str, Any]]
    write: Callable[[Path, Sequence[Result], Mapping[str, Any]], None]

    def settings(self, case: Case, steps: int | None) -> list[str]:
        """Everything that a run's recipe has of its own but for paths and threads; they identify a result."""
        data, objective = self.data[case.data], self.objectives[case.objective]
        length = [f"steps={steps or data.steps}", "epochs=null"]
        chosen = []
        if objective is not None:
            chosen = [f"objective={json.dumps({**objective, **data.objective.get(objective['kind'], {})})}"]
        return [*data.settings, *length, *chosen, f"seed={case.seed}"]

    def recipe(self, case: Case, options: Options) -> Recipe:
        data = self.data[case.data]
        shards = data.shards(options.out)
        engine = f"engine={{kind: none, device: cpu, precision: fp32, threads: {options.threads}}}"
        paths = [f"run={options.out / 'runs' / case.name}", f"data.train={shards}/train-*.tar"]
        frugal = ["loader.workers=0", "log={every: 10, tensorboard: false}", "checkpoint.every=1000000"]
        own = [*self.settings(case, options.steps), engine, *paths, f"data.eval={shards}/test-*.tar", *frugal]
        return mvpretrain.load_recipe(ROOT / f"recipes/{data.recipe}.yaml", own)

    def planned(self, case: Case, options: Options) -> dict[str, Any]:
        """What a finished result must say of itself to be this case's."""
        data = self.data[case.data]
        packing = {"packing": list(data.packing)} if data.packing else {}
        return {"settings": self.settings(case, options.steps), "rows": list(data.rows), **packing}

    def finished(self, case: Case, options: Options) -> dict[str, Any] | None:
        """The result of a run, None where there is none. ValueError: it had other settings."""
        path = options.out / "results" / f"{case.name}.json"
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        for key, value in self.planned(case, options).items():
            if result.get(key) != value:
                raise ValueError(f"{path} is of {key} {result.get(key)}, not {value}; give another --out, or remove it")
        return result

    def run(self, case: Case, options: Options) -> None:
        """Train and measure one case in this process; write its result."""
        begin, recipe = time.perf_counter(), self.recipe(case, options)
        folder = Path(recipe.run)
        shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(options.threads)
        if self.objectives[case.objective] is None:
            torch.manual_seed(case.seed)
            task = recipe.task(SingleProcess()).eval()
        else:
            mvpretrain.train(recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": None})}))
            task = ended(recipe)
        trained = time.perf_counter()
        measured = self.measure(recipe, task, self.data[case.data])
        result = {**case._asdict(), **self.planned(case, options), **measured}
        result["seconds"] = {"training": trained - begin, "evaluation": time.perf_counter() - trained}
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_text(options.out / "results" / f"{case.name}.json", json.dumps(result, indent=1))


def ended(recipe: Recipe) -> Task:
    """The run's task at its end, what its objective knows of single samples included."""
    engine = train.build_engine(recipe, engines.start(engines.resolve(recipe.engine)))
    checkpoint.restore(checkpoint.find(Path(recipe.run)), engine)
    return engine.task.eval()


def main(experiment: Experiment, about: str, argv: Sequence[str] | None) -> int:
    """The command of an experiment, `about` its help: the runs that are missing, then the report. The exit code."""
    options = arguments(experiment, about, argv)
    shared = Options(options.out, options.steps, options.threads)
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    if options.child:
        data, objective, seed = options.child
        experiment.run(Case(data, objective, int(seed)), shared)
        return 0
    wanted = list(cases(experiment, options))
    missing = [case for case in wanted if experiment.finished(case, shared) is None]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them finished before", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        good = all(list(pool.map(lambda case: start(experiment, case, options), missing)))
    results = [result for case in wanted if (result := experiment.finished(case, shared))]
    if results:
        experiment.write(options.out, results, circumstances(experiment, argv, options))
        print(f"{options.out}/comparison.md, .json and .png are of {len(results)} runs")
    return 0 if good and results else 1


def arguments(experiment: Experiment, about: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (("--data", experiment.data), ("--objectives", experiment.objectives)):
        names = list(known)
        parser.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    out = Path("runs") / experiment.tool.rpartition(".")[2]
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each (3)")
    parser.add_argument("--steps", type=int, help="for all data sets, instead of their own")
    parser.add_argument("--out", type=Path, default=out, help=f"shards, runs, results ({out})")
    parser.add_argument("--sources", type=Path, default=ROOT.parent / "shared/data", help="the folder of the data sets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def cases(experiment: Experiment, options: argparse.Namespace) -> Iterator[Case]:
    """All runs that can be had, seed by seed, so that an early table has every row."""
    data = [name for name in options.data if prepare(name, experiment.data[name], options.out, options.sources)]
    known = objectives.registry.kinds()
    chosen = []
    for name in options.objectives:
        setting = experiment.objectives[name]
        if setting is None or setting["kind"] in known:
            chosen.append(name)
        else:
            print(f"{name} is left out: there is no objective of kind {setting['kind']!r}")
    for name in data:
        print(f"{name}: {' '.join(experiment.settings(Case(name, 'untrained', 0), options.steps)[:-1])}")
    for seed in range(options.seeds):
        for name in data:
            without = experiment.data[name].without
            yield from (Case(name, objective, seed) for objective in chosen if objective not in without)


def prepare(name: str, data: DataSet, out: Path, sources: Path) -> bool:
    """The shards of a data set in OUT/data, made where they are not there; whether they can be had."""
    folder = data.shards(out)
    paths = [sources / source for source in data.sources]
    if folder.exists():
        return True
    for path in paths:
        if not path.exists():
            print(f"{name} is left out: there is no {path}; give its folder by --sources")
            return False
    importlib.import_module(f"tools.data.{data.make}").main([*map(str, paths), str(folder), *data.packing])
    return True


def start(experiment: Experiment, case: Case, options: argparse.Namespace) -> bool:
    """One run in a process of its own; whether it finished."""
    own = ["--out", str(options.out), "--threads", str(options.threads), "--child", *map(str, case)]
    own += ["--steps", str(options.steps)] if options.steps else []
    path = options.out / "results" / f"{case.name}.log"
    begin = time.perf_counter()
    with path.open("w") as log:
        command = [sys.executable, "-m", experiment.tool, *own]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    took = time.perf_counter() - begin
    if code:
        last = path.read_text().strip().rpartition("\n")[2]
        print(f"{case.name} failed after {took:.0f} s: {last} ({path})", flush=True)
    else:
        print(f"{case.name}: {took:.0f} s", flush=True)
    return not code


def circumstances(experiment: Experiment, argv: Sequence[str] | None, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know to repeat the table."""
    given = sys.argv[1:] if argv is None else list(argv)
    return {
        "command": shlex.join(["python", "-m", experiment.tool, *given]),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"CPU with {os.cpu_count()} cores; runs at once: {options.jobs}, threads of each: {options.threads}",
    }

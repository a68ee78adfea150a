"""One run of tools/compare_objectives.py: what is compared on which data, and how a run is trained and measured."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvpretrain
from mvpretrain import checkpoint, exporting, feed
from mvpretrain.evaluation.collect import Table, collect
from mvpretrain.evaluation.probes import linear
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.exchange import Alone, share
from mvpretrain.recipe import Recipe
from mvpretrain.shards.stream import Stream
from mvpretrain.task import Task
from mvpretrain.tower import Tower
from mvpretrain.types import Embeddings

ROOT = Path(__file__).resolve().parents[1]
DRAWS = 3  # of the labelled samples
BUDGETS = (10, 50)  # labelled samples a class, and all of them
ROWS = 256  # encoded at once in evaluation
REPEATS = 5  # of an objective's timing
CPU = torch.device("cpu")


class DataSet(NamedTuple):
    """A recipe on real data, cut down to minutes on a core."""

    make: str  # tools/make_NAME.py
    sources: tuple[str, ...]  # what it reads, below SOURCES
    recipe: str
    steps: int
    settings: tuple[str, ...]  # that differ from the recipe's
    probed: tuple[str, ...]  # views that a probe reads
    rows: tuple[int, int]  # the most labelled and the most held-out samples
    note: str
    augmented: bool = False  # views that differ by their augmentation alone are augmented in retrieval too
    without: tuple[str, ...] = ()  # objectives that cannot be had


M3G_IS_N_TO_THE_K = "The batch is small for all of them because M3G works on n^k tuples"
MFEAT = DataSet(
    make="mfeat",
    sources=("mfeat",),
    recipe="mfeat",
    steps=500,
    settings=("batch=12", "schedule.warmup=30"),
    probed=("fou", "fac", "kar", "pix", "zer", "mor"),
    rows=(1600, 400),
    note=f"k = 6 sets of features of handwritten digits. {M3G_IS_N_TO_THE_K}.",
)
FOUR_CROPS = "{kind: image, field: jpg;png, tower: image, size: 16, normalize: half, augment: simclr}"
DATA = {
    "mfeat": MFEAT,
    "avmnist": DataSet(
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
        note="k = 3: image, spoken digit and caption, paired by class alone. Each sample is its own only positive in "
        "training, though a tenth of a batch is of its class; retrieval is scored by class "
        "and is easy. The probes leave out the captions, which name the class.",
    ),
    "cifar10": DataSet(
        make="cifar10",
        sources=("cifar10_jpg/cifar10_jpg.tar.xz",),
        recipe="simclr_cifar10",
        steps=200,
        settings=(
            f"views={{a: {FOUR_CROPS}, b: {FOUR_CROPS}, c: {FOUR_CROPS}, d: {FOUR_CROPS}}}",
            "towers={image: {encoder: {kind: conv, width: 16, stages: 3}, head: {layers: 2}}}",
            "dim=64",
            "batch=64",
            "optimizer={kind: adamw, lr: 2.0e-3, weight_decay: 0.05}",
            "schedule.warmup=20",
        ),
        probed=("a",),
        rows=(5000, 1000),
        note="k = 4 augmentations of an image of 16 x 16 pixels through one small network, which sees a quarter "
        f"of an epoch. {M3G_IS_N_TO_THE_K}. Retrieval is between augmentations of held-out images.",
        augmented=True,
    ),
    "mfeat256": MFEAT._replace(
        steps=300,
        settings=("batch=256", "schedule.warmup=30"),
        note="As mfeat, with the batch that objectives over pairs can have; 256^6 tuples leave M3G out.",
        without=("m3g", "m3g-sharp"),
    ),
}

OBJECTIVES: dict[str, dict[str, Any] | None] = {
    "m3g": {"kind": "m3g", "epsilon": 0.2},
    "m3g-sharp": {"kind": "m3g", "temperature": 0.2, "tolerance": 0.01, "max_sweeps": 10},
    "infonce": {"kind": "infonce", "temperature": {"init": 0.07}},
    "one_vs_rest": {"kind": "one_vs_rest", "temperature": {"init": 0.07}},
    "symile": {"kind": "symile"},
    "gram": {"kind": "gram"},
    "untrained": None,
}


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


def settings(case: Case, steps: int | None) -> list[str]:
    """Everything that a run's recipe has of its own but for places and threads; a result is told by them."""
    data = DATA[case.data]
    length = [f"steps={steps or data.steps}", "epochs=null"]
    objective = OBJECTIVES[case.objective]
    chosen = [] if objective is None else [f"objective={json.dumps(objective)}"]
    return [*data.settings, *length, *chosen, f"seed={case.seed}"]


def recipe_of(case: Case, options: Options) -> Recipe:
    shards = options.out / "data" / DATA[case.data].make
    engine = f"engine={{kind: none, device: cpu, precision: fp32, threads: {options.threads}}}"
    places = [f"run={options.out / 'runs' / case.name}", f"data.train={shards}/train-*.tar"]
    frugal = ["loader.workers=0", "log={every: 10, tensorboard: false}", "checkpoint.every=1000000"]
    own = [*settings(case, options.steps), engine, *places, f"data.eval={shards}/test-*.tar", *frugal]
    return mvpretrain.load_recipe(ROOT / f"recipes/{DATA[case.data].recipe}.yaml", own)


def finished(case: Case, options: Options) -> dict[str, Any] | None:
    """The result of a run, None where there is none. ValueError: it had other settings."""
    path = options.out / "results" / f"{case.name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    planned = {"settings": settings(case, options.steps), "rows": list(DATA[case.data].rows)}
    for key, value in planned.items():
        if result[key] != value:
            raise ValueError(f"{path} is of {key} {result[key]}, not {value}; give another --out, or remove it")
    return result


def run(case: Case, options: Options) -> None:
    """Train and measure one case in this process; write its result."""
    begin, recipe, data = time.perf_counter(), recipe_of(case, options), DATA[case.data]
    folder = Path(recipe.run)
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(options.threads)
    if case.objective == "untrained":
        torch.manual_seed(case.seed)
        task = recipe.task(Alone()).eval()
    else:
        mvpretrain.train(recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": None})}))
        task = exporting.trained(recipe, checkpoint.find(folder))
    trained = time.perf_counter()
    measured = measure(recipe, task, data)
    result = {**case._asdict(), "settings": settings(case, options.steps), "rows": data.rows, **measured}
    result["seconds"] = {"training": trained - begin, "evaluation": time.perf_counter() - trained}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    path = options.out / "results" / f"{case.name}.json"
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1))
    aside.rename(path)


def measure(recipe: Recipe, task: Task, data: DataSet) -> dict[str, Any]:
    """Everything that is measured of trained towers."""
    test, probes = embedded(recipe, task, data), probed(recipe, task, data)
    found = dict(retrieval(test, Alone(), CPU, recipe.evaluation.by_label, ("rest", "product")))
    train = feed.samples(stream(recipe, "train", data.probed, augmented=False))
    seen = recipe.batch * recipe.total_steps(train)
    return {
        "sizes": {"seen": seen, "train": train, "labelled": min(train, data.rows[0]), "held_out": len(test.ids)},
        "scores": scores(found, probes),
        "probes": probes,
        "retrieval": found,
        "cost": cost(recipe, test) if (Path(recipe.run) / "log.jsonl").is_file() else {},
    }


def stream(recipe: Recipe, split: feed.Split, views: Sequence[str], augmented: bool) -> Stream:
    transforms = {v: t for v, t in feed.transforms(recipe, augmented).items() if v in views}
    return Stream(feed.sources(recipe, split), transforms, ROWS, recipe.seed, recipe.loader)


@torch.no_grad()
def embedded(recipe: Recipe, task: Task, data: DataSet) -> Table:
    """The held-out samples in the shared space."""
    batches = stream(recipe, "eval", list(recipe.views), data.augmented).whole(data.rows[1])
    return collect(task, batches, Alone(), CPU)


def probed(recipe: Recipe, task: Task, data: DataSet) -> dict[str, dict[str, list[float]]]:
    """View -> labelled samples a class -> accuracy for each draw."""
    train_x, train_y = features(recipe, task, "train", data.probed, data.rows[0])
    test_x, test_y = features(recipe, task, "eval", data.probed, data.rows[1])
    draws: dict[str, list[Tensor]] = {
        str(n): [drawn(train_y, n, DRAWS * recipe.seed + i) for i in range(DRAWS)] for n in BUDGETS
    }
    draws["all"] = [torch.arange(len(train_y))]
    return {
        v: {
            budget: [linear(train_x[v][rows], train_y[rows], test_x[v], test_y, recipe.seed) for rows in chosen]
            for budget, chosen in draws.items()
        }
        for v in data.probed
    }


@torch.no_grad()
def features(
    recipe: Recipe, task: Task, split: feed.Split, views: Sequence[str], limit: int
) -> tuple[dict[str, Tensor], Tensor]:
    """(encoders' outputs before the head, labels) of the samples of a split, not augmented."""
    found: dict[str, list[Tensor]] = {v: [] for v in views}
    labels = []
    for batch in stream(recipe, split, views, augmented=False).whole(limit):
        whole = torch.stack(list(batch.present.values())).all(dim=0)
        labels.append(batch.labels[whole])
        for v in views:
            tower = task.towers[task.views[v]]
            assert isinstance(tower, Tower)
            found[v].append(tower.encoder(batch.views[v])[whole])
    return {v: torch.cat(parts) for v, parts in found.items()}, torch.cat(labels)


def drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """Places of `count` samples of each class, or of all that it has."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])


def scores(found: dict[str, float], probes: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """The table's figures of one run, shares of 1."""
    made = {
        f"linear/{budget}": statistics.mean(statistics.mean(by_budget[budget]) for by_budget in probes.values())
        for budget in next(iter(probes.values()))
    }
    made["pairs"] = found["retrieval/mean/R@1"]
    for fusion in ("rest", "product"):
        starts = f"retrieval/{fusion}-"
        made[fusion] = statistics.mean(x for n, x in found.items() if n.startswith(starts) and n.endswith("/R@1"))
    made["chance"] = statistics.mean(x for name, x in found.items() if name.endswith("/chance"))
    return made


def cost(recipe: Recipe, table: Table) -> dict[str, Any]:
    """Milliseconds of a step by phase, from the log; the objective's alone, forward and backward; the last record."""
    log = [json.loads(line) for line in (Path(recipe.run) / "log.jsonl").read_text().splitlines()]
    # The first record has what a process does once.
    records = log[1:] or log
    phases = [name for name in log[-1] if name.startswith("time/")]
    return {
        "phases": {name.removeprefix("time/"): statistics.mean(r[name] for r in records) for name in phases},
        "objective_ms": objective_ms(recipe, table),
        "last": log[-1],
    }


def objective_ms(recipe: Recipe, table: Table) -> float:
    """Loss and gradient of one batch of held-out rows, the median of a few."""
    objective = recipe.objective.for_dim(recipe.dim).build(list(recipe.views), Alone())
    some = slice(0, recipe.batch)
    z = {v: x[some].clone().requires_grad_() for v, x in table.z.items()}
    rows = Embeddings(z, table.ids[some], {v: p[some] for v, p in table.present.items()}, table.labels[some])
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        objective(*share(rows, Alone())).total.backward()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[1:])

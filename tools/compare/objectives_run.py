"""What tools/compare/objectives.py compares on which data, and what a run measures."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from mvpretrain.data.build import count_samples
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.evaluation._collect import Table
from mvpretrain.evaluation._probes import linear
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.types import Embeddings
from tools.compare.experiment import AVMNIST, DataSet
from tools.compare.experiment_measure import CPU, embedded, features, logged, sizes, stream

DRAWS = 3  # of the labelled samples
BUDGETS = (10, 50)  # labelled samples a class, and all of them
REPEATS = 5  # of an objective's timing
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
    "avmnist": AVMNIST._replace(
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
    "m3g-sharp": {"kind": "m3g", "temperature": 0.2},
    "infonce": {"kind": "infonce", "temperature": {"init": 0.07}},
    "one_vs_rest": {"kind": "one_vs_rest", "temperature": {"init": 0.07}},
    "symile": {"kind": "symile"},
    "gram": {"kind": "gram"},
    "untrained": None,
}


def measure(recipe: Recipe, task: Task, data: DataSet) -> dict[str, Any]:
    """Everything that is measured of trained towers."""
    test, probes = embedded(recipe, task, data), probed(recipe, task, data)
    found = dict(retrieval(test, SingleProcess(), CPU, recipe.evaluation.by_label, ("rest", "product")))
    train = count_samples(stream(recipe, "train", data.probed, augmented=False).sources)
    log = logged(recipe)
    return {
        "sizes": sizes(recipe, train, min(train, data.rows[0]), len(test.ids)),
        "scores": scores(found, probes),
        "probes": probes,
        "retrieval": found,
        "cost": {**log, "objective_ms": objective_ms(recipe, test)} if log else {},
    }


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


def objective_ms(recipe: Recipe, table: Table) -> float:
    """Loss and gradient of one batch of held-out rows, the median of a few."""
    objective = recipe.objective.for_dim(recipe.row_dim()).build(list(recipe.views), SingleProcess())
    rows = Embeddings(table.z, table.ids, table.present, table.labels).rows(slice(recipe.batch))
    rows = rows._replace(z={v: x.clone().requires_grad_() for v, x in rows.z.items()})
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        objective(*gather_embeddings(rows, SingleProcess())).total.backward()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[1:])

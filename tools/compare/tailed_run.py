"""What tools/compare/tailed.py compares on which data, and what a run measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvpretrain.data.sources.shards import ShardsConfig
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation._probes import accuracy, knn_guesses, linear_guesses
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.types import SampleTemperatures
from tools.compare.experiment import AVMNIST, DataSet
from tools.compare.experiment_measure import CPU, embedded, features, logged, sizes, stream

THIRDS = ("head", "middle", "tail")
PROBES: dict[str, Callable[..., Tensor]] = {"linear": linear_guesses, "knn": knn_guesses}

FIXED = {"init": 0.1, "learnable": False}
# rho bounds a divergence, in nats, that cannot exceed the logarithm of the number of negatives: 63 or 126 in a batch
# here. Values of 6 to 7, meant for large batches, pin all temperatures to their lower bound. isogclr has what its
# authors chose for CIFAR; the others' rho was taken on eurosat, seed 0, for temperatures that stay within their bounds,
# not for accuracy.
GAMMA = {"value": 0.2, "decay_steps": 100}  # half a cosine over half of the run, as its authors have it
OBJECTIVES: dict[str, dict[str, Any] | None] = {
    "infonce": {"kind": "infonce", "temperature": FIXED},
    "infonce-learned": {"kind": "infonce", "temperature": {"init": 0.1}},
    "sogclr": {"kind": "sogclr"},
    "isogclr": {"kind": "isogclr", "rho": 0.4, "min": 0.05, "clip": 3.0},
    "fastclip-v1": {"kind": "fastclip", "variant": "v1", "gamma": GAMMA},
    "fastclip-v2": {"kind": "fastclip", "variant": "v2", "rho": 0.5, "gamma": GAMMA},
    "fastclip-v3": {"kind": "fastclip", "variant": "v3", "rho": 1.0, "gamma": GAMMA},
    "amcl-1": {"kind": "amcl", "heads": 1},
    "amcl-3": {"kind": "amcl", "heads": 3},
    "amcl-5": {"kind": "amcl", "heads": 5},
    "untrained": None,
}
# Views of one kind repel the other samples of their own view too.
IN_VIEW = {kind: {"in_view": True} for kind in ("infonce", "sogclr", "isogclr", "amcl")}
DIM = "dim=60"  # of each head
# All heads have batch normalisation: with layer normalisation, the hardest negatives of amcl's `aggregate: top` let the
# features collapse.


def augmentations(kinds: int) -> str:
    """SimCLR's augmentations of small images, so many of them: crop, flip, colour jitter, grey, blur."""
    settings = ("crop: [0.2, 1.0]", "flip: 0.5", "jitter: 0.5", "grayscale: 0.2", "blur: 0.5")
    return f"{{{', '.join(settings[:kinds])}}}"


def two_images(field: str, side: int, augment: str) -> tuple[str, ...]:
    """Settings of two augmented views of an image through one small network."""
    view = f"{{kind: image, field: {field}, tower: image, size: {side}, normalize: half, augment: {augment}}}"
    return (
        f"views={{a: {view}, b: {view}}}",
        "towers={image: {encoder: {kind: conv, width: 16, stages: 3}, head: {layers: 2, norm: batch}}}",
        DIM,
        "batch=64",
        "optimizer={kind: adamw, lr: 2.0e-3, weight_decay: 0.05}",
        "schedule.warmup=20",
    )


CIFAR10 = DataSet(
    make="cifar10",
    sources=("cifar10_jpg/cifar10_jpg.tar.xz",),
    recipe="simclr_cifar10",
    steps=200,
    settings=two_images("jpg;png", 16, "simclr"),
    probed=("a",),
    rows=(1000, 2000),
    note="Two augmentations of a photograph of 16 x 16 pixels; the most frequent class is 100 times the rarest.",
    augmented=True,
    packing=("--train=1250", "--tail=100", "--val=100"),
    objective=IN_VIEW,
)
DATA = {
    "avmnist": AVMNIST._replace(
        settings=(
            *AVMNIST.settings,
            *(f"towers.{tower}.head.norm=batch" for tower in ("image", "audio", "text")),
            DIM,
        ),
        rows=(500, 1000),
        note="k = 3: image, spoken digit and caption, paired by class alone; the most frequent class is 100 times the "
        "rarest. Retrieval is scored by class. The probes leave out the captions, which name the class.",
        packing=("--train=1500", "--tail=100", "--val=50"),
    ),
    "cifar10": CIFAR10,
    "eurosat": DataSet(
        make="eurosat",
        sources=("eurosat_2k5",),
        recipe="simclr_cifar10",
        steps=200,
        settings=two_images("png", 16, "simclr"),
        probed=("a",),
        rows=(200, 600),
        note="Two augmentations of a satellite photograph of 16 x 16 pixels; the most frequent class is 50 times the "
        "rarest, which has 3 samples.",
        augmented=True,
        packing=("--tail=50",),
        objective=IN_VIEW,
    ),
}
AUGMENTED = ("infonce", "amcl-3")  # compared over the number of augmentations
AXIS = {
    f"cifar10-{kinds}": CIFAR10._replace(
        settings=two_images("jpg;png", 16, augmentations(kinds)),
        without=tuple(name for name in OBJECTIVES if name not in AUGMENTED),
        note=f"As cifar10, augmented by {kinds} of: crop, flip, colour jitter, grey, blur.",
    )
    for kinds in range(1, 6)
}


def measure(recipe: Recipe, task: Task, data: DataSet) -> dict[str, Any]:
    """Probes by third of the classes, retrieval where views differ in kind, learned temperatures by class."""
    ids, classes = trained_on(recipe)
    frequency = classes.bincount()
    assert isinstance(recipe.data, ShardsConfig) and isinstance(recipe.data.train, str)
    val = str(Path(recipe.data.train).with_name("val-*.tar"))
    labelled = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": val})})
    known, known_y = features(labelled, task, "train", data.probed, data.rows[0])
    test, test_y = features(recipe, task, "eval", data.probed, data.rows[1])
    found: dict[str, float] = {}
    if not data.augmented:
        table = embedded(recipe, task, data)
        found = dict(retrieval(table, SingleProcess(), CPU, recipe.evaluation.by_label))
    guesses = {name: [probe(known[v], known_y, test[v]) for v in data.probed] for name, probe in PROBES.items()}
    return {
        "sizes": sizes(recipe, len(ids), len(known_y), len(test_y)),
        "frequency": frequency.tolist(),
        "scores": scores(guesses, test_y, thirds(frequency), found),
        "retrieval": found,
        "temperatures": temperatures(task.objective, ids, classes),
        "cost": logged(recipe),
    }


def trained_on(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(ids, classes) of the training samples."""
    batches = list(stream(recipe, "train", [], augmented=False).whole())
    ids, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "labels"))
    return ids[ids != -1], labels[ids != -1]


def thirds(frequency: Tensor) -> dict[str, Tensor]:
    """The classes of each third by frequency in training; the first takes what does not divide."""
    order = np.argsort(-frequency.numpy(), kind="stable")
    return {name: torch.from_numpy(part) for name, part in zip(THIRDS, np.array_split(order, len(THIRDS)))}


def scores(
    guesses: Mapping[str, Sequence[Tensor]],
    labels: Tensor,
    parts: Mapping[str, Tensor],
    found: Mapping[str, float],
) -> dict[str, float]:
    """The table's figures of one run, shares of 1, means over the probed views."""
    rows = {"all": torch.ones_like(labels, dtype=torch.bool)}
    rows |= {name: torch.isin(labels, classes) for name, classes in parts.items()}
    made = {
        f"{probe}/{name}": sum(accuracy(guess[some], labels[some]) for guess in by_view) / len(by_view)
        for probe, by_view in guesses.items()
        for name, some in rows.items()
    }
    if found:
        chances = [x for name, x in found.items() if name.endswith("/chance")]
        made |= {"pairs": found["retrieval/mean/R@1"], "chance": sum(chances) / len(chances)}
    return made


def temperatures(objective: Any, ids: Tensor, classes: Tensor) -> dict[str, dict[str, float]]:
    """Class -> mean and standard deviation of the temperatures that its training samples have learned, and how many.

    {} where the objective keeps no temperatures by sample id (`SampleTemperatures`).
    """
    if not isinstance(objective, SampleTemperatures):
        return {}
    seen, values = (x.detach().cpu() for x in objective.temperatures())
    order = ids.argsort()
    at = torch.searchsorted(ids[order], seen).clamp(max=len(ids) - 1)
    own = order[at]
    known = (ids[own] == seen) & values.isfinite()
    labels, values = classes[own[known]], values[known].double()
    return {
        str(label): {
            "mean": float(values[labels == label].mean()),
            "std": float(values[labels == label].std(correction=0)),
            "seen": int((labels == label).sum()),
        }
        for label in labels.unique().tolist()
    }

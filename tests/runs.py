"""A run as training leaves it, without the training: recipe, checkpoints with random weights, and its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mvpretrain import recipe
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.recipe import Recipe
from mvpretrain.shards.pack import write

VECTOR, WORDS = 6, 12


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two vector views that share a tower with batch norm, and text; the shards' samples have three classes."""
    return {
        "run": str(folder / "run"),
        "data": {"train": str(folder / "data/train-000000.tar"), "eval": str(folder / "data/eval-000000.tar")}
        | {"kind": "shards", "label": "cls"},
        "views": {
            "left": {"kind": "vector", "field": "left.npy", "dim": VECTOR, "tower": "both", "std": 2.0},
            "right": {"kind": "vector", "field": "right.npy", "dim": VECTOR, "tower": "both"},
            "text": {"kind": "text", "field": "txt", "length": WORDS},
        },
        "towers": {
            "both": {
                "encoder": {"kind": "mlp", "input": VECTOR, "width": 16, "dropout": 0.5},
                "head": {"layers": 2, "norm": "batch"},
                "freeze": True,
                "train_blocks": 1,
                "lr": 0.5,
            },
            "text": {"encoder": {"kind": "transformer", "length": WORDS, "width": 8, "depth": 1, "heads": 2}},
        },
        "objective": {"kind": "infonce"},
        "dim": 5,
        "batch": 8,
        "steps": 10,
        "loader": {"workers": 0},
        "evaluation": {"by_label": ["text"]},
        **changes,
    }


def trained(parsed: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Weights and statistics that no fresh module has."""
    torch.manual_seed(step)
    task = parsed.task(SingleProcess())
    for name, value in task.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else 0.5 * torch.randn_like(value))
    return {name: value.clone() for name, value in task.state_dict().items()}


def make_run(folder: Path, **changes: Any) -> Path:
    """`folder/run` with checkpoints of steps 5 and 10; the first is the best one."""
    parsed = recipe.parse(settings(folder, **changes))
    run = folder / "run"
    for step in (5, 10):
        place = run / f"checkpoints/step-{step:08d}"
        place.mkdir(parents=True)
        save_file(trained(parsed, step), place / "weights.safetensors")
        (place / "meta.json").write_text(json.dumps({"step": step, "metrics": {"retrieval/mean/R@1": step / 100}}))
    (run / "checkpoints/best.json").write_text(json.dumps({"checkpoint": "step-00000005", "value": 1.0}))
    (run / "recipe.yaml").write_text(parsed.dump())
    (run / "log.jsonl").write_text('{"step": 1, "samples/s": 50.0}\n{"step": 2, "samples/s": 70.0, "loss": 1.0}\n')
    return run


def samples(count: int, seed: int) -> list[dict[str, Any]]:
    """Raw samples in no order: every seventh lacks its text, the fifth has an unreadable array."""
    random = np.random.default_rng(seed)
    made = []
    for i in random.permutation(count).tolist():
        label = int(random.integers(3))
        centre = 3 * np.eye(3, VECTOR)[label]
        left, right = (centre + random.standard_normal(VECTOR).astype(np.float32) for _ in range(2))
        sample = {"__key__": f"s{i:03d}", "left.npy": left.astype(np.float32), "right.npy": right.astype(np.float32)}
        sample |= {"txt": f"{'abc'[label] * 3} {i}", "cls": label}
        if i % 7 == 0:
            del sample["txt"]
        if i == 5:
            sample["left.npy"] = b"no array"
        made.append(sample)
    return made


def make_shards(folder: Path, train: int = 60, test: int = 31) -> dict[str, list[dict[str, Any]]]:
    """`folder/data/{train,eval}-000000.tar`; returns the samples in shard order."""
    (folder / "data").mkdir()
    made = {"train": samples(train, 0), "eval": samples(test, 1)}
    for name, listed in made.items():
        write(listed, folder / "data", name)
    return made

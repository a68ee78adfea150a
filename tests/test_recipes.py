"""Every recipe in recipes/ loads and trains: two steps on synthetic data, and a little of the real data where it is."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mvpretrain
from mvpretrain.recipe import load

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]

SMALL_CLIP = (
    "{embed_dim: 512, vision_cfg: {image_size: 32, patch_size: 16, width: 16, head_width: 8, layers: 1}, "
    "text_cfg: {context_length: 77, vocab_size: 49408, width: 8, heads: 1, layers: 1}}"
)
# What a recipe for GPUs is cut down by, to be tried in seconds on a CPU.
SMALLER = {
    "clip_vit_b32": [
        "views.image.size=32",
        f"towers.image.encoder={{kind: openclip, modality: image, config: {SMALL_CLIP}}}",
        f"towers.text.encoder={{kind: openclip, modality: text, config: {SMALL_CLIP}}}",
        "engine.precision=auto",
    ],
    "simclr_cifar10": ["views.first.size=16", "views.second.size=16"],
}


def here(run: Path, *overrides: str) -> list[str]:
    """Overrides that let any recipe run in this process, on a CPU."""
    engine = ["engine.kind=none", "engine.device=cpu", "engine.threads=1", "loader.workers=0"]
    return [f"run={run}", *engine, "log={every: 1, tensorboard: false}", *overrides]


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_opens_with_its_command(path: Path) -> None:
    opening = path.read_text().split("\nrun:")[0].splitlines()
    assert len(opening) > 1 and all(line.startswith("#") for line in opening), opening
    assert any(f"train recipes/{path.name}" in line for line in opening), opening
    assert load(path).run == f"runs/{path.stem}"


def test_the_walk_meets_every_recipe() -> None:
    assert {"digits", "avmnist", "mfeat", "clip_vit_b32", "simclr_cifar10"} <= set(NAMES)
    assert set(SMALLER) <= set(NAMES), "a recipe has another name now"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_smoke(path: Path, tmp_path: Path) -> None:
    data = "data={kind: synthetic, samples: 48, eval_samples: 16}"
    size = ["batch=8", "steps=2", "epochs=null", "schedule.warmup=0"]
    recipe = load(path, here(tmp_path / "run", data, *size, *SMALLER.get(path.stem, ())))
    run = mvpretrain.train(recipe)
    losses = [record["loss"] for record in log(run) if "loss" in record]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses), losses
    weights = load_file(run / "checkpoints/step-00000002/weights.safetensors")
    assert {name.split(".")[1] for name in weights if name.startswith("towers.")} == set(recipe.towers)
    assert any(name.startswith("retrieval/") for name in log(run)[-1])
    assert load(run) == recipe


def source(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"the data set {name} is not beside the repository")
    return str(DATA / name)


def learnt(name: str, folder: Path, arguments: list[str], *overrides: str) -> list[dict[str, float]]:
    """The log of a recipe's run on real data, whose shards tools/make_NAME.py has made from `arguments`."""
    data = [f"data.train={folder}/data/train-*.tar", f"data.eval={folder}/data/test-*.tar"]
    importlib.import_module(f"tools.data.{name}").main([*arguments, str(folder / "data")])
    settings = here(folder / "run", *data, "epochs=null", "schedule.warmup=2", *overrides)
    return log(mvpretrain.train(load(ROOT / f"recipes/{name}.yaml", settings)))


def test_mfeat_learns(tmp_path: Path) -> None:
    steps = learnt("mfeat", tmp_path, [source("mfeat")], "steps=12", "evaluation.limit=100")
    losses, found = [record["loss"] for record in steps if "loss" in record], steps[-1]
    assert losses[-1] < min(losses[0], math.log(128)) - 0.5, losses  # ln(batch) is the loss of knowing nothing
    assert found["retrieval/fac-kar/R@10"] > 5 * 10 * found["retrieval/fac-kar/chance"], found


def test_avmnist_trains_on_all_its_views(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="sound is decoded by soundfile")
    few = ["--train", "60", "--test", "20", source("mnist"), source("fsdd")]
    steps = learnt("avmnist", tmp_path, few, "steps=4", "batch=16")
    assert all(math.isfinite(record["loss"]) and record["skipped"] == 0 for record in steps[:-1]), steps
    assert steps[-1]["retrieval/audio-text/queries"] == 20
    assert steps[-1]["retrieval/audio-text/chance"] > 1 / 20  # pairs are scored by class

"""tools/compare/objectives.py: one run end to end on made-up digits, going on where it stopped, and its table."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvpretrain import objectives
from mvpretrain.evaluation._collect import Table

ROOT = Path(__file__).parents[3]
DIMS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}


@pytest.fixture
def compare(tool: Any) -> ModuleType:
    return tool("compare.objectives")


@pytest.fixture
def runs(tool: Any) -> ModuleType:
    return tool("compare.objectives_run")


@pytest.fixture
def shared(tool: Any) -> ModuleType:
    """What the experiments have alike."""
    return tool("compare.experiment")


@pytest.fixture
def report(tool: Any) -> ModuleType:
    return tool("compare.objectives_report")


def digits(folder: Path, count: int = 100) -> None:
    """Six tables of ten classes, sorted by class as in the original."""
    random = np.random.default_rng(0)
    labels = np.sort(np.arange(count) % 10)
    folder.mkdir(parents=True)
    for view, dim in DIMS.items():
        table = random.standard_normal((10, dim))[labels] + 2.5 * random.standard_normal((count, dim))
        header = ",".join([*(f"x{i}" for i in range(dim)), "label"])
        np.savetxt(folder / f"mfeat-{view}.csv", np.c_[table, labels], delimiter=",", header=header, comments="")


def test_a_run_is_measured_once_and_the_command_goes_on(
    compare: ModuleType, shared: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits(tmp_path / "sources/mfeat")
    out = tmp_path / "out"
    given = ["--out", str(out), "--sources", str(tmp_path / "sources"), "--steps", "3", "--seeds", "1"]
    given += ["--data", "mfeat", "avmnist", "--objectives", "infonce", "untrained"]
    (out / "results").mkdir(parents=True)
    assert shared.prepare("mfeat", compare.EXPERIMENT.data["mfeat"], out, tmp_path / "sources")
    # The first in this process, where its parts can be looked at; the command starts the other in one of its own.
    case, options = shared.Case("mfeat", "infonce", 0), shared.Options(out, 3, 1)
    assert compare.EXPERIMENT.finished(case, options) is None
    compare.EXPERIMENT.run(case, options)
    before = (out / "results/mfeat-infonce-0.json").stat().st_mtime_ns
    assert compare.main(given) == 0
    assert (out / "results/mfeat-infonce-0.json").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert "avmnist is left out: there is no" in said and "2 runs, 1 of them finished before" in said

    whole = json.loads((out / "comparison.json").read_text())
    assert whole["command"].endswith("--objectives infonce untrained") and len(whole["runs"]) == 2
    trained, fresh = whole["runs"]
    assert trained["sizes"] == {"seen": 36, "train": 80, "labelled": 80, "held_out": 20}
    assert list(trained["probes"]) == list(DIMS) and trained["retrieval"]["retrieval/product-mor/queries"] == 20
    assert trained["retrieval"] != fresh["retrieval"] and trained["probes"] != fresh["probes"]
    assert trained["scores"]["chance"] == pytest.approx(1 / 20) and trained["scores"]["linear/all"] > 0.2
    assert trained["cost"]["phases"].keys() >= {"objective", "backward"} and trained["cost"]["objective_ms"] > 0
    assert fresh["cost"] == {} and not (out / "runs/mfeat-infonce-0/checkpoints").exists()
    table = (out / "comparison.md").read_text()
    assert "## mfeat" in table and "| infonce | temperature {init: 0.07} |" in table
    assert (out / "comparison.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"steps=3.*not.*steps=4.*--out"):
        compare.EXPERIMENT.finished(case, options._replace(steps=4))


def test_a_run_that_fails_is_said(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (tmp_path / "data/mfeat").mkdir(parents=True)
    assert compare.main(["--out", str(tmp_path), "--data", "mfeat", "--objectives", "infonce", "--seeds", "2"]) == 1
    said = capsys.readouterr().out
    assert "mfeat-infonce-0 failed" in said and "mfeat-infonce-1 failed" in said
    assert not (tmp_path / "comparison.md").exists()


def test_every_objective_fits_every_data_set(
    compare: ModuleType, runs: ModuleType, shared: ModuleType, tmp_path: Path
) -> None:
    for data, chosen in runs.DATA.items():
        for name in runs.OBJECTIVES:
            if name in chosen.without:
                continue
            recipe = compare.EXPERIMENT.recipe(shared.Case(data, name, 2), shared.Options(tmp_path, None, 1))
            assert (recipe.seed, recipe.steps, recipe.epochs) == (2, chosen.steps, None)
            assert set(chosen.probed) <= set(recipe.views)
            assert runs.OBJECTIVES[name] is None or recipe.objective.kind == runs.OBJECTIVES[name]["kind"]
    assert {o["kind"] for o in runs.OBJECTIVES.values() if o} <= set(objectives.registry.kinds())
    views = {"mfeat": 6, "avmnist": 3, "cifar10": 4}
    for data, k in views.items():
        recipe = compare.EXPERIMENT.recipe(shared.Case(data, "m3g", 0), shared.Options(tmp_path, None, 1))
        assert len(recipe.views) == k


def test_augmentations_of_an_image_differ_where_they_are_asked_for(
    tool: Any, compare: ModuleType, shared: ModuleType, runs: ModuleType, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{i}.png")
    tool("data.cifar10").main([str(tmp_path / "images"), str(tmp_path / "data/cifar10")])
    recipe = compare.EXPERIMENT.recipe(shared.Case("cifar10", "infonce", 0), shared.Options(tmp_path, None, 1))
    for augmented in (True, False):
        (batch,) = runs.stream(recipe, "eval", ["a", "d"], augmented).whole(6)
        assert list(batch.views) == ["a", "d"] and batch.views["a"].data.shape[1:] == (3, 16, 16)
        assert bool((batch.views["a"].data == batch.views["d"].data).all()) is not augmented
    torch.manual_seed(0)
    task = recipe.task(runs.SingleProcess()).eval()
    x, y = runs.features(recipe, task, "train", ["a"], 4)
    (batch,) = runs.stream(recipe, "train", ["a"], False).whole(4)
    expected = task.towers["image"].encoder(batch.views["a"])[:4]
    torch.testing.assert_close(x["a"], expected.detach())
    assert x["a"].shape == (4, 64) and y.tolist() == batch.labels[:4].tolist()
    assert isinstance(runs.embedded(recipe, task, runs.DATA["cifar10"]), Table)


def test_labelled_samples_are_drawn_by_class(runs: ModuleType) -> None:
    labels = torch.tensor([2] * 30 + [0] * 4 + [1] * 16)[torch.randperm(50)]
    rows = runs.drawn(labels, 10, 0)
    assert rows.unique().numel() == len(rows) and labels[rows].bincount().tolist() == [4, 10, 10]
    assert torch.equal(rows, runs.drawn(labels, 10, 0)) and not torch.equal(rows, runs.drawn(labels, 10, 1))


def test_scores_are_means_over_views_and_draws(runs: ModuleType) -> None:
    probes = {"a": {"10": [0.1, 0.3], "all": [0.5]}, "b": {"10": [0.6, 0.8], "all": [1.0]}}
    found = {"retrieval/mean/R@1": 0.4, "retrieval/a-b/R@1": 0.9, "retrieval/a-b/chance": 0.25}
    found |= {"retrieval/rest-a/R@1": 0.2, "retrieval/rest-b/R@1": 0.4, "retrieval/rest-b/R@10": 1.0}
    found |= {"retrieval/product-a/R@1": 0.1, "retrieval/product-b/R@1": 0.7}
    expected = {"linear/10": 0.45, "linear/all": 0.75, "pairs": 0.4, "rest": 0.3, "product": 0.4, "chance": 0.25}
    assert runs.scores(found, probes) == pytest.approx(expected)


def made_up(report: ModuleType, objective: str, seed: int, shift: float) -> dict[str, Any]:
    """A result with a score of its own in every column."""
    names = [*report.PROBES, *report.RETRIEVAL]
    scores = {name: 0.1 * (i + 1) + shift + 0.01 * seed for i, name in enumerate(names)}
    phases = {"encode": 20.0, "objective": 10.0, "backward": 10.0}
    cost = {"phases": phases, "objective_ms": 12.0 + seed, "last": {"temperature": 0.25, "newton_steps": 4.0}}
    sizes = {"seen": 6000, "train": 1600, "labelled": 1600, "held_out": 400}
    made = {"data": "mfeat", "objective": objective, "seed": seed, "settings": ["batch=12", "objective={}", "seed=1"]}
    return {**made, "scores": {**scores, "chance": 0.0025}, "sizes": sizes, "cost": cost if objective == "m3g" else {}}


def test_the_table_says_mean_and_spread(report: ModuleType, tmp_path: Path) -> None:
    results = [made_up(report, "m3g", seed, 0.0) for seed in (0, 1, 3)] + [made_up(report, "untrained", 0, 0.05)]
    report.write(tmp_path, results[::-1], {"command": "python -m tools.compare.objectives", "date": "2026-11-22"})
    page = (tmp_path / "comparison.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.splitlines() if line.startswith("|")}
    first = [0.1, 0.11, 0.13]
    mean, std = 100 * statistics.mean(first), 100 * statistics.stdev(first)
    scored = next(line for line in page.splitlines() if line.startswith("| m3g | epsilon 0.2 |")).split(" | ")
    assert scored[2] == f"{mean:.1f} ± {std:.1f}" == "11.3 ± 1.5" and scored[-1] == "3 |"
    assert rows["untrained"][2:4] == ["15.0", "25.0"] and rows["untrained"][-1] == "1 |"  # one seed has no spread
    assert rows["m3g"][1:] == ["40", "25.0 %", "25.0 %", "13.3", "0.25", "4.0", " |"]  # the costs come last
    assert "Chance of R@1: 0.2 %" in page and "`batch=12`" in page and "seed=1" not in page
    whole = json.loads((tmp_path / "comparison.json").read_text())
    assert whole["summary"]["mfeat"]["m3g"]["linear/10"] == pytest.approx(
        {"mean": mean / 100, "std": std / 100, "seeds": 3}
    )
    assert len(whole["runs"]) == 4 and whole["date"] == "2026-11-22"


def test_the_plot_has_a_panel_for_each_data_set_and_group(report: ModuleType) -> None:
    results = [made_up(report, "m3g", seed, 0.0) for seed in (0, 1)] + [made_up(report, "gram", 0, 0.05)]
    other = [result | {"data": "cifar10"} for result in results[:2]]
    axes = report.figure(results + other).axes
    assert len(axes) == 4 and [a.get_title().split(":")[0] for a in axes] == ["mfeat", "mfeat", "cifar10", "cifar10"]
    points = np.asarray(axes[0].containers[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(points, [10.5, 20.5, 30.5])
    assert [t.get_text() for t in axes[1].get_xticklabels()] == list(report.RETRIEVAL.values())

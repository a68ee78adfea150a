"""tools/compare/tailed.py: a run end to end on made-up images, what is measured by class, and its tables and plots."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvpretrain import objectives
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.views.image import random_steps

ROOT = Path(__file__).parents[3]


@pytest.fixture
def runs(tool: Any) -> ModuleType:
    return tool("compare.tailed_run")


@pytest.fixture
def report(tool: Any) -> ModuleType:
    return tool("compare.tailed_report")


def photographs(folder: Path) -> None:
    """Three classes of small images, each of a colour of its own."""
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for label, name in enumerate(("cat", "dog", "emu")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 180, (16, 16, 3), np.uint8)
                pixels[:, :, label] += 75
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_a_run_is_measured_by_class_and_kinds_that_are_not_there_are_left_out(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, shared = tool("compare.tailed"), tool("compare.experiment")
    small = compare.EXPERIMENT.data["cifar10"]._replace(packing=("--tail=5", "--val=4"))
    chosen = compare.EXPERIMENT.objectives | {"another": {"kind": "another"}}
    ended, measure = [], compare.EXPERIMENT.measure

    def watched(recipe: Recipe, task: Task, data: Any) -> dict[str, Any]:
        ended.append(float(getattr(task.objective, "log_temperature").detach().exp()))  # noqa: B009
        return measure(recipe, task, data)

    experiment = compare.EXPERIMENT._replace(data={"cifar10": small}, objectives=chosen, measure=watched)
    monkeypatch.setattr(compare, "EXPERIMENT", experiment)
    photographs(tmp_path / "images")
    tool("data.cifar10").main([str(tmp_path / "images"), str(small.shards(tmp_path)), *small.packing])
    (tmp_path / "results").mkdir()
    options = shared.Options(tmp_path, 3, 1)
    for objective in ("infonce-learned", "untrained"):
        experiment.run(shared.Case("cifar10", objective, 0), options)
    # Objectives are measured as they ended, not as they are built.
    assert abs(ended[0] - 0.1) > 1e-5
    given = ["--out", str(tmp_path), "--steps", "3", "--seeds", "1", "--data", "cifar10"]
    assert compare.main([*given, "--objectives", "infonce-learned", "another", "untrained"]) == 0
    said = capsys.readouterr().out
    assert "another is left out: there is no objective of kind 'another'" in said
    assert "2 runs, 2 of them finished before" in said

    trained, fresh = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert sorted(trained["frequency"]) == [5, 12, 26] and trained["packing"] == ["--tail=5", "--val=4"]
    assert trained["sizes"] == {"seen": 192, "train": 43, "labelled": 12, "held_out": 18}
    thirds = [trained["scores"][f"knn/{part}"] for part in ("head", "middle", "tail")]
    assert trained["scores"]["knn/all"] == pytest.approx(sum(thirds) / 3)  # as many test samples in each
    assert "pairs" not in trained["scores"] and trained["temperatures"] == {}
    assert trained["cost"]["phases"].keys() >= {"objective", "backward"} and fresh["cost"] == {}
    page = (tmp_path / "comparison.md").read_text()
    assert "## cifar10" in page and "| infonce-learned | temperature {init: 0.1} |" in page
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"comparison.png"} and "![comparison](comparison.png)" in page
    with pytest.raises(ValueError, match=r"of packing \['--tail=5', '--val=4'\], not \['--tail=9'\]"):
        other = experiment._replace(data={"cifar10": small._replace(packing=("--tail=9",))})
        other.finished(shared.Case("cifar10", "infonce-learned", 0), options)


def test_every_objective_that_is_there_fits_every_data_set(tool: Any, runs: ModuleType, tmp_path: Path) -> None:
    compare, shared = tool("compare.tailed"), tool("compare.experiment")
    known = set(objectives.registry.kinds())
    for data, chosen in compare.EXPERIMENT.data.items():
        for name, setting in runs.OBJECTIVES.items():
            if name in chosen.without or (setting and setting["kind"] not in known):
                continue
            recipe = compare.EXPERIMENT.recipe(shared.Case(data, name, 2), shared.Options(tmp_path, None, 1))
            assert (recipe.seed, recipe.steps, recipe.dim) == (2, chosen.steps, 60)
            assert set(chosen.probed) <= set(recipe.views)
            # Augmentations of one image repel their own kind, views that differ in kind do not.
            if setting and setting["kind"] in runs.IN_VIEW:
                assert getattr(recipe.objective, "in_view") is chosen.augmented  # noqa: B009  not all kinds have it
    assert all(chosen in runs.OBJECTIVES for chosen in runs.AUGMENTED)


def test_augmentations_are_added_one_after_the_other(tool: Any, runs: ModuleType, tmp_path: Path) -> None:
    compare, shared = tool("compare.tailed"), tool("compare.experiment")
    kinds = []
    for data in runs.AXIS:
        recipe = compare.EXPERIMENT.recipe(shared.Case(data, "infonce", 0), shared.Options(tmp_path, None, 1))
        augment = {name: getattr(view, "augment") for name, view in recipe.views.items()}  # noqa: B009
        assert list(augment) == ["a", "b"] and augment["a"] == augment["b"]
        kinds.append([type(step).__name__ for step in random_steps(augment["a"], 16)])
    assert [len(steps) for steps in kinds] == [1, 2, 3, 4, 5]
    assert all(longer[: len(steps)] == steps for steps, longer in pairwise(kinds))


def test_thirds_are_by_frequency(runs: ModuleType) -> None:
    found = runs.thirds(torch.tensor([5, 90, 7, 30, 20, 60, 10]))
    assert {name: sorted(part.tolist()) for name, part in found.items()} == {
        "head": [1, 3, 5],
        "middle": [4, 6],
        "tail": [0, 2],
    }


def test_scores_are_of_the_samples_of_a_third_and_means_over_views(runs: ModuleType) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    parts = {"head": torch.tensor([1]), "tail": torch.tensor([0, 2])}
    guesses = {"knn": [torch.tensor([0, 1, 1, 1, 2, 0]), torch.tensor([1, 1, 1, 1, 1, 1])]}
    found = {"retrieval/mean/R@1": 0.5, "retrieval/a-b/chance": 0.1, "retrieval/b-a/chance": 0.3}
    expected = {"knn/all": (4 / 6 + 2 / 6) / 2, "knn/head": 1.0, "knn/tail": (2 / 4 + 0) / 2}
    assert runs.scores(guesses, labels, parts, {}) == pytest.approx(expected)
    assert runs.scores(guesses, labels, parts, found) == pytest.approx(expected | {"pairs": 0.5, "chance": 0.2})


def test_temperatures_are_means_over_a_classs_samples_that_were_seen(runs: ModuleType) -> None:
    ids, classes = torch.tensor([40, -7, 30, 20, 50]), torch.tensor([1, 0, 1, 0, 2])
    kept = torch.tensor([20, 40, 30, 99, 50, -7]), torch.tensor([0.25, 0.1, 0.3, 9.0, torch.nan, 0.75])
    found = runs.temperatures(SimpleNamespace(temperatures=lambda: kept), ids, classes)
    assert found.keys() == {"0", "1"}  # 99 was not trained on, 50 never an anchor
    assert found["0"] == pytest.approx({"mean": 0.5, "std": 0.25, "seen": 2})
    assert found["1"] == pytest.approx({"mean": 0.2, "std": 0.1, "seen": 2})
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
    assert runs.temperatures(SimpleNamespace(temperatures=lambda: nothing), ids, classes) == {}
    assert runs.temperatures(SimpleNamespace(), ids, classes) == {}


def made_up(report: ModuleType, data: str, objective: str, seed: int) -> dict[str, Any]:
    scores = {name: 0.05 * (i + 1) + 0.01 * seed for i, name in enumerate([*report.LINEAR, *report.KNN])}
    own = {str(c): {"mean": 0.1 * (c + 1) + 0.01 * seed, "std": 0.0, "seen": 3} for c in range(3)}
    cost = {"phases": {"objective": 3.0, "backward": 20.0}, "last": {"temperature": 0.125}}
    return {
        "data": data,
        "objective": objective,
        "seed": seed,
        "settings": ["dim=60", "seed=0"],
        "sizes": {"seen": 600, "train": 60, "labelled": 12, "held_out": 30},
        "frequency": [10, 100, 1000],
        "scores": scores | ({"pairs": 0.5, "chance": 0.1} if data == "avmnist" else {}),
        "temperatures": own if objective == "isogclr" else {},
        "cost": {} if objective == "untrained" else cost,
    }


@pytest.fixture
def results(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    # What a kind sets by default is the report's business only where that kind is there.
    monkeypatch.setitem(report.OBJECTIVES, "isogclr", {"kind": "isogclr", "rho": 0.5})
    compared = [("avmnist", "infonce"), ("cifar10", "isogclr"), ("cifar10", "untrained"), ("cifar10-2", "infonce")]
    return [made_up(report, *names, seed) for names in compared for seed in (0, 1)]


def test_the_tables_say_accuracy_by_third_and_temperature_by_class(
    report: ModuleType, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    report.write(tmp_path, results[::-1], {"command": "python -m tools.compare.tailed"})
    page = (tmp_path / "comparison.md").read_text()
    first, cifar = page.split("## cifar10\n")
    row = next(line for line in cifar.splitlines() if line.startswith("| isogclr | rho 0.5 |")).split(" | ")
    assert row[2:6] == ["5.5 ± 0.7", "10.5 ± 0.7", "15.5 ± 0.7", "20.5 ± 0.7"]
    assert row[-4:] == ["0.125", "23", "3.0", "2 |"]
    assert "view to view |" in first and "view to view |" not in cifar and "Chance of R@1: 10.0 %" in first
    assert "| objective | 2: 1,000 | 1: 100 | 0: 10 |" in cifar
    assert "| isogclr | 0.305 ± 0.007 | 0.205 ± 0.007 | 0.105 ± 0.007 |" in cifar
    assert "| 2 | infonce | 5.5 ± 0.7 |" in cifar
    assert {path.stem for path in tmp_path.glob("*.png")} == {"comparison", "temperatures", "augmentations"}
    assert json.loads((tmp_path / "comparison.json").read_text())["summary"]["cifar10"]["isogclr"]["linear/tail"] == (
        pytest.approx({"mean": 0.205, "std": 0.01 / 2**0.5, "seeds": 2})
    )


def test_the_plots(report: ModuleType, results: list[dict[str, Any]]) -> None:
    found = report.Findings(results, report.DATA | report.AXIS, report.OBJECTIVES)
    panels = report.comparison(found, report.main_sets(found)).axes
    assert [a.get_title().split(":")[0] for a in panels] == ["avmnist", "avmnist", "cifar10", "cifar10"]
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["all", "head", "middle", "tail"]
    points = np.asarray(panels[3].containers[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(points, [25.5, 30.5, 35.5, 40.5])
    (panel,) = report.temperatures(found, report.learned(found)).axes
    line = panel.containers[0].lines[0]
    assert panel.get_xscale() == "log" and panel.get_title() == "cifar10"
    assert list(line.get_xdata()) == [1000, 100, 10]
    assert list(line.get_ydata()) == pytest.approx([0.305, 0.205, 0.105])
    left, right = report.augmentations(found).axes
    values = [float(np.ravel(axes.containers[0].lines[0].get_ydata())[0]) for axes in (left, right)]
    assert values == pytest.approx([5.5, 20.5]) and right.get_title() == (
        "cifar10: accuracy of linear probe, tail classes, percent"
    )

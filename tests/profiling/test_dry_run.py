"""What `--dry-run` says, on a recipe whose figures can be counted by hand. What it refuses: see test_cli.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from mvpretrain import recipe
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.profiling.dry_run import print_dry_run
from mvpretrain.profiling.memory_plan import Plan
from tests.data import test_faults as shards

VALUE: dict[str, Any] = {
    "run": "runs/previewed",
    "data": {"kind": "synthetic", "samples": 100, "eval_samples": 30, "missing": {"c": 0.5}},
    "views": {
        "a": {"kind": "vector", "field": "a", "dim": 4, "tower": "both"},
        "b": {"kind": "vector", "field": "b", "dim": 4, "tower": "both"},
        "c": {"kind": "text", "field": "c", "length": 12},
    },
    "towers": {
        "both": {"encoder": {"kind": "mlp", "input": 4, "width": 8, "depth": 1, "norm": "none"}, "freeze": True},
        "c": {"encoder": {"kind": "transformer", "length": 12, "width": 8, "depth": 1, "heads": 2}},
    },
    "objective": {"kind": "infonce"},
    "dim": 6,
    "batch": 20,
    "epochs": 3,
    "loader": {"workers": 0},
    "engine": {"device": "cpu"},
}


def shown(value: dict[str, Any], memory: int | None = None) -> tuple[str, Plan]:
    """The dry run's text, every run of spaces and table lines made one space, and its plan."""
    console = Console(file=io.StringIO(), width=200)
    plan = print_dry_run(recipe.parse(value), console, memory)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().replace("│", " ").split()), plan


def said(value: dict[str, Any]) -> str:
    return shown(value)[0]


def test_towers_steps_memory_and_shapes(tmp_path: Path) -> None:
    text = said(VALUE)
    whole = recipe.parse(VALUE)
    counts = [sum(p.numel() for p in tower.parameters()) for tower in whole.task(SingleProcess()).towers.values()]
    assert counts[0] == 4 * 8 + 8 + 8 * 6  # layer, bias, head
    assert f"both mlp a, b {counts[0]} 48 c transformer c {counts[1]:,} {counts[1]:,}" in text
    assert "steps: 15 of 20 samples, 3.0 epochs of 100, 30 held out" in text
    assert "engine: none on 1 rank(s), cpu, fp32; 20 samples a rank" in text
    assert "objective: infonce" in text
    assert "a 20x4 float32 none 20 of 20 20x6" in text
    assert "c 20x12 int64" in text and "of 20 20x6" in text
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_named() -> None:
    text = said({**VALUE, "teacher": {"momentum": 0.9, "views": ["c"], "queue": 40}})
    count = sum(p.numel() for p in recipe.parse(VALUE).task(SingleProcess()).towers["c"].parameters())
    words = f"teacher: momentum 0.9, views c@teacher, {count:,} parameters that are not trained, a queue of 40 rows"
    assert words in text and "teacher: momentum" not in said(VALUE)


def test_ranks_that_are_not_there_yet() -> None:
    text = said({**VALUE, "engine": {"device": "cpu", "kind": "zero2", "ranks": 4}})
    assert "engine: zero2 on 4 rank(s), cpu, fp32; 5 samples a rank" in text
    assert "a 5x4 float32 none 5 of 5 5x6" in text


def test_bad_samples_and_damaged_tars_are_named(tmp_path: Path) -> None:
    made = shards.samples(16)
    for sample in made:
        sample["png"] = b"no image"
    urls = shards.write(tmp_path, made[:8], made[8:])
    cut = tmp_path / "t-1.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    text = said(shards.settings(tmp_path, urls))
    assert f"{cut}: the end-of-archive mark is missing" in text
    assert "not usable: image: " in text and "(8)" in text
    assert "vector 8x4 float32 none 0 of 8 8x4" in text


def test_memory_by_moments_and_whether_it_fits() -> None:
    text, plan = shown(VALUE, 8 * 2**30)
    for item in ("process", "weights", "optimizer state", "activations", "gradients", "objective", "batch"):
        assert item in text, item
    assert "┃ encode ┃ objective ┃ backward ┃ optimizer ┃" in text
    moment = max(plan.totals, key=lambda name: plan.totals[name])
    peak = f"predicted peak: {plan.peak / 2**20:,.1f} MiB a rank, at the moment '{moment}'"
    assert f"{peak}; it fits into 8,192.0 MiB" in text and "switch" not in text
    assert "loader's batches" not in text  # no workers, nothing ahead
    ahead = said({**VALUE, "loader": {"workers": 1, "prefetch": 4}})
    assert "besides, in the machine's memory: loader's batches, by all its workers" in ahead
    assert "it fits into" in ahead  # the machine's own memory


def test_what_to_turn_where_it_does_not_fit() -> None:
    text, _ = shown({**VALUE, "engine": {"device": "cpu", "ranks": 2, "kind": "ddp"}}, 2**20)
    assert "it does not fit into 1.0 MiB" in text
    order = ["engine.micro_batch=1", "checkpoint_activations=true in towers both, c", "engine.kind=zero1"]
    order += ["engine.kind=zero2", "engine.kind=zero3", "engine.kind=zero3 checkpoint_activations=true"]
    places = [text.index(f" {setting} ") for setting in order]
    assert places == sorted(places) and text.count("too large") == 6

"""What `--dry-run` says, on a recipe whose figures can be counted by hand. What it refuses: see test_cli.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mvpretrain import recipe
from mvpretrain.preview import preview
from tests import test_data_faults as shards

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


def said(value: dict[str, Any]) -> str:
    """The preview's text, every run of spaces and table lines made one space."""
    console = Console(file=io.StringIO(), width=200)
    preview(recipe.parse(value), console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().replace("│", " ").split())


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_towers_steps_memory_and_shapes(tmp_path: Path) -> None:
    text = said(VALUE)
    whole = recipe.parse(VALUE)
    from mvpretrain.exchange import Alone

    counts = [sum(p.numel() for p in tower.parameters()) for tower in whole.task(Alone()).towers.values()]
    assert counts[0] == 4 * 8 + 8 + 8 * 6  # layer, bias, head
    assert f"both mlp a, b {counts[0]} 48 c transformer c {counts[1]:,} {counts[1]:,}" in text
    assert "steps: 15 of 20 samples, 3.0 epochs of 100, 30 held out" in text
    assert "engine: none on 1 rank(s), cpu, fp32; 20 samples a rank" in text
    memory = whole.objective.memory(3, 20, 20, 6) / 2**20
    assert f"objective: infonce, {memory:.1f} MiB a rank" in text
    assert "a 20x4 float32 none 20 of 20 20x6" in text
    assert "c 20x12 int64" in text and "of 20 20x6" in text
    assert not list(tmp_path.iterdir())


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

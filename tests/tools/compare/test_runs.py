"""tools/compare/runs.py tells equal runs from others, by exit code and in words."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[3]


@pytest.fixture
def compare() -> Any:
    return importlib.import_module("tools.compare.runs").main


def run(folder: Path, losses: Sequence[float], **weights: torch.Tensor) -> str:
    """A run's folder with these losses, as train writes it; its first checkpoint is always the same."""
    last = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2)} | weights
    for step, tensors in ((1, {"a.weight": torch.zeros(2, 3)}), (len(losses), last)):
        place = folder / f"checkpoints/step-{step:08d}"
        place.mkdir(parents=True)
        save_file(tensors, place / "weights.safetensors")
    records: list[dict[str, float]] = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    records.insert(2, {"step": 2, "retrieval/mean/R@1": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def test_equal_runs(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [3.25, float("nan"), 1 / 3]
    assert compare([run(tmp_path / "a", losses), run(tmp_path / "b", losses)]) == 0
    out = capsys.readouterr().out
    assert "losses: 3 of 3 bit-identical" in out and "weights of step-00000003: 2 of 2 bit-identical" in out


def test_the_largest_difference_and_the_first_step(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(tmp_path / "a", [3.0, 2.0, 1.0, 0.5])
    two = run(tmp_path / "b", [3.0, 2.0 + 1e-7, 1.25, 0.5], **{"b.bias": torch.tensor([1.0, 1.5])})
    assert compare([one, two]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "losses: 2 of 4 bit-identical, 2 differ by more than 0"
    assert lines[1] == "step 3: 0.25" and lines[3] == "first that differs: step 2"
    assert "b.bias: 0.5" in lines and "first that differs: b.bias" in lines
    assert compare([one, two, "--tolerance", "0.5"]) == 0
    assert compare([one, two, "--tolerance", "0.3"]) == 1  # the weights alone


def test_what_only_one_run_has(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "a", [3.0, 2.0, 1.0])
    assert compare([one, run(tmp_path / "longer", [3.0, 2.0, 1.0, 0.5])]) == 1
    assert "in one run only: step 4" in capsys.readouterr().out
    assert compare([one, run(tmp_path / "wider", [3.0, 2.0, 1.0], c=torch.ones(1))]) == 1
    assert "in one run only: c" in capsys.readouterr().out
    assert compare([one, run(tmp_path / "shaped", [3.0, 2.0, 1.0], **{"b.bias": torch.ones(3)})]) == 1
    assert "b.bias: inf" in capsys.readouterr().out


def test_nothing_to_compare(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare([run(tmp_path / "a", [1.0, 2.0, 3.0]), str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "nowhere/log.jsonl" in capsys.readouterr().err

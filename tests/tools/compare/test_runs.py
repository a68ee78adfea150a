"""tools/compare/runs.py tells equal runs from others, by exit code and in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools.compare.runs import between, main


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


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [3.25, float("nan"), 1 / 3]
    assert main([run(tmp_path / "a", losses), run(tmp_path / "b", losses)]) == 0
    out = capsys.readouterr().out
    assert "losses: 3 of 3 bit-identical" in out and "weights of step-00000003: 2 of 2 bit-identical" in out


def test_the_largest_difference_and_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "a", [3.0, 2.0, 1.0, 0.5])
    two = run(tmp_path / "b", [3.0, 2.0 + 1e-7, 1.25, 0.5], **{"b.bias": torch.tensor([1.0, 1.5])})
    assert main([one, two]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "losses: 2 of 4 bit-identical, 2 differ by more than 0"
    assert lines[1] == "step 3: 0.25" and lines[3] == "first that differs: step 2"
    assert "b.bias: 0.5" in lines and "first that differs: b.bias" in lines
    assert main([one, two, "--tolerance", "0.5"]) == 0
    assert main([one, two, "--tolerance", "0.3"]) == 1  # the weights alone


def test_what_only_one_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "a", [3.0, 2.0, 1.0])
    assert main([one, run(tmp_path / "longer", [3.0, 2.0, 1.0, 0.5])]) == 1
    assert "in one run only: step 4" in capsys.readouterr().out
    assert main([one, run(tmp_path / "wider", [3.0, 2.0, 1.0], c=torch.ones(1))]) == 1
    assert "in one run only: c" in capsys.readouterr().out
    assert main([one, run(tmp_path / "shaped", [3.0, 2.0, 1.0], **{"b.bias": torch.ones(3)})]) == 1
    assert "b.bias: inf" in capsys.readouterr().out


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([run(tmp_path / "a", [1.0, 2.0, 3.0]), str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "nowhere/log.jsonl" in capsys.readouterr().err


class Moved:
    """A class of the package in a state file."""

    def __init__(self, step: int):
        self.step = step


def whole(folder: Path, moment: float, step: int, cursor: int) -> str:
    """A run whose last checkpoint has everything that train writes."""
    path = run(folder, [2.0, 1.0, 0.5])
    last = folder / "checkpoints/step-00000003"
    torch.save({"optimizer": {"state": {0: {"exp_avg": torch.tensor([moment])}}}}, last / "engine.pt")
    save_file({"averages/rows": torch.tensor([torch.nan, 1.0])}, last / "keyed-0.safetensors")
    torch.save({"numpy": np.random.RandomState(0).get_state(), "place": Moved(step)}, last / "rank-0.pt")
    (last / "meta.json").write_text(json.dumps({"step": 3, "cursor": [3, [cursor]]}))
    return path


def test_everything_in_a_checkpoint_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = whole(tmp_path / "a", 0.5, 1, 96)
    monkeypatch.setattr(Moved, "__module__", "tests.elsewhere")  # a class that moved is read by its name
    monkeypatch.setitem(__import__("sys").modules, "tests.elsewhere", __import__("sys").modules[__name__])
    assert main([one, whole(tmp_path / "b", 0.5, 1, 96)]) == 0
    assert "numbers by sample id of step-00000003: 1 of 1 bit-identical" in capsys.readouterr().out
    for i, (given, name) in enumerate(
        {
            (0.25, 1, 96): "engine.pt: optimizer/state/0/exp_avg: 0.25",
            (0.5, 2, 96): "rank-0.pt: place/Moved/1/step: 1",
            (0.5, 1, 64): "meta.json: cursor/1/0: 32",
        }.items()
    ):
        assert main([one, whole(tmp_path / str(i), *given)]) == 1
        assert name in capsys.readouterr().out


def test_times_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run(tmp_path / name, [3.0, 2.0, 1.0]) for name in "ab")
    for path, time, norm in ((one, 1.0, 0.5), (two, 2.0, 0.5)):
        with (Path(path) / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "samples/s": time, "time/encode": time, "grad_norm": norm}) + "\n")
    assert main([one, two]) == 0
    assert "log values: 2 of 2 bit-identical" in capsys.readouterr().out


def test_the_last_bit() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert between(nan, nan.clone()) == 0 and between(nan, torch.tensor([torch.nan, 1.5])) == 0.5
    assert between(torch.zeros(1), -torch.zeros(1)) > 0
    assert between(nan, torch.ones(2)) == between(1, 1.0) == between(nan, nan.double()) == float("inf")
    assert between("a", "a") == 0 and between("a", "b") == float("inf") and between(0.1 + 0.2, 0.3) > 0

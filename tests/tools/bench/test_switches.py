"""tools/bench/switches.py: its switches are settings, its sides go in turn, its ratios are on over off."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from mvpretrain import recipe
from mvpretrain.shards.check import check


@pytest.fixture
def tool() -> Any:
    return importlib.import_module("tools.bench.switches")


def figures(samples: float, peak: int, device: str = "cpu") -> dict[str, Any]:
    phases = {"encode": 60 / samples, "backward": 120 / samples, "optimizer": 5.0}
    return {"samples": samples, "peaks": [peak - 1, peak], "baseline": 100, "device": device, "milliseconds": phases}


def test_every_switch_is_a_setting(tool: Any, tmp_path: Path) -> None:
    path = tool.own_recipe(tmp_path, count=12)
    assert check(f"{tmp_path}/shards/*.tar").good
    plain = recipe.load(path)
    for name, switch in tool.switches(plain, ranks=2).items():
        off, on = recipe.load(path, switch.off), recipe.load(path, switch.on)
        assert off != on, name
        assert plain.model_copy(update={"optimizer": off.optimizer}) == off, name
        if name.startswith("micro_batch"):
            assert on.engine.micro_batch == plain.batch // 2 // tool.PARTS
    assert tool.switches(plain, 1)["length_groups"].on == ["towers.text.length_groups=4"]


def test_texts_are_of_many_lengths(tool: Any) -> None:
    lengths = sorted(len(sample["txt"]) for sample in tool.samples(50))
    assert 10 <= lengths[0] < lengths[25] / 1.5 and lengths[25] < lengths[-1] / 1.5 <= 84


def test_ratios_are_on_over_off(tool: Any) -> None:
    found = tool.compared(
        "x", ("encode",), [figures(10, 300), figures(20, 300), figures(30, 300)],
        [figures(20, 200), figures(20, 200), figures(45, 200)],
    )  # fmt: skip
    assert (found.speed, found.lowest, found.highest, found.memory) == (1.5, 1.0, 2.0, 0.5)
    assert found.milliseconds == {"encode": (3.0, 3.0)}
    assert tool.held(figures(1, 300, "some GPU")) == 300 and tool.held(figures(1, 300)) == 200


def test_sides_go_in_turn_and_what_cannot_run_is_a_row(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides: list[bool] = []

    def in_processes(path: Path, overrides: list[str], ranks: int, steps: int, warmup: int) -> dict[str, Any]:
        assert path.exists() and overrides[0] == "batch=16" and (ranks, steps, warmup) == (1, 6, 2)
        if "engine.compile=true" in overrides:
            raise ValueError("no compiler\n  here")
        sides.append("engine.precision=bf16" in overrides)
        return figures(30.0 if sides[-1] else 20.0, 300)

    monkeypatch.setattr(tool, "in_processes", in_processes)
    out = tmp_path / "rows.json"
    assert tool.main(["batch=16", "--json", str(out), "--only", "bf16", "compile"]) == 0
    assert sides == [False, True, False, True, False]
    first, second = json.loads(out.read_text())
    assert first["speed"] == 1.5 and first["reason"] == "" and second["reason"] == "no compiler here"
    text = capsys.readouterr().out
    assert "1.50 x" in text and "encode 3.0 -> 2.0 ms" in text and "-   no compiler here" in text
    with pytest.raises(SystemExit):
        tool.main(["--only", "bf17"])
    text_free = {v: {"kind": "vector", "field": v, "dim": 8} for v in "ab"}
    towers = {v: {"encoder": {"kind": "mlp", "input": 8}} for v in "ab"}
    changes = [f"views={json.dumps(text_free)}", f"towers={json.dumps(towers)}", "batch=16"]
    assert tool.main([*changes, "--only", "length_groups"]) == 0
    assert "no tower of this recipe reads text" in capsys.readouterr().out

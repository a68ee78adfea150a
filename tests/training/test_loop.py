"""The loop trains any module that turns a batch into losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mvpretrain import recipe
from mvpretrain.engine import Engine, resolve, start
from mvpretrain.training import checkpoint
from mvpretrain.training.loop import Unconverged, run_loop
from mvpretrain.training.train import loop_settings, train
from mvpretrain.types import Batch, Losses

VALUE = {
    "data": {"kind": "synthetic", "samples": 40, "eval_samples": 0},
    "views": {v: {"kind": "vector", "field": v, "dim": 6} for v in "ab"},
    "towers": {v: {"encoder": {"kind": "mlp", "input": 6}} for v in "ab"},
    "objective": {"kind": "infonce"},
    "batch": 8,
    "steps": 6,
    "loader": {"workers": 0},
    "schedule": {"kind": "constant"},
    "log": {"every": 1, "tensorboard": False},
    "engine": {"kind": "none", "device": "cpu", "threads": 1},
    "evaluation": {"every": 3},
    "checkpoint": {"every": 3, "best": "own/figure", "keep": 9},
}


class Predicts(nn.Module):
    """One view from the other: no towers, no teacher, no timer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2))

    def forward(self, batch: Batch) -> Losses:
        loss = (self.layers(batch.views["a"].data) - batch.views["b"].data).square().mean()
        return Losses(loss, {"own/part": loss.detach()})


def trained(folder: Path, steps: int = 6, resume_from: Path | None = None, **engine: Any) -> Path:
    """The last checkpoint of a run of these steps."""
    settings = recipe.parse(VALUE | {"run": str(folder), "steps": steps, "engine": VALUE["engine"] | engine})  # type: ignore[operator]
    module = Predicts()
    optimizer = torch.optim.AdamW([{"params": [*module.parameters()], "base_lr": 0.1, "lr": 0.1, "weight_decay": 0.0}])
    stream = settings.stream("train")
    assert stream is not None
    seen: list[bool] = []

    def evaluate(engine: Engine) -> dict[str, float]:
        seen.append(engine.task is module)
        return {"own/figure": float(len(seen))}

    world, used = start(resolve(settings.engine)), loop_settings(settings, steps)
    run_loop(world, module, optimizer, stream, used, resume_from, evaluate)
    assert all(seen)
    return checkpoint.find(folder)


def test_another_module_is_trained_evaluated_saved_and_resumed(tmp_path):
    whole = trained(tmp_path / "whole")
    half = trained(tmp_path / "half", steps=3)
    again = trained(tmp_path / "half", resume_from=half)
    one, other = (load_file(path / "weights.safetensors") for path in (whole, again))
    assert {"layers.0.weight", "layers.0.bias"} == one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], load_file(half / "weights.safetensors")["layers.0.weight"])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "half")]
    losses, resumed = ([json.loads(line).get("loss") for line in log] for log in logs)
    assert losses == resumed and len(losses) == 8  # six steps and two evaluations
    first = json.loads(logs[0][0])
    assert first["own/part"] == first["loss"] and first["time/backward"] > 0
    assert json.loads((whole / "meta.json").read_text())["metrics"] == {"own/figure": 2.0}


def test_micro_batches_of_another_module_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.micro_batch=4 works on a contrastive Task .* not on a Predicts"):
        trained(tmp_path, micro_batch=4)


def test_a_solver_that_did_not_converge_is_counted_and_said():
    counted = Unconverged()
    for step in range(6):
        short = torch.tensor(float(step in (1, 4)))
        counted.add({"loss": torch.tensor(2.0), "unconverged": short, "m3g/unconverged": torch.tensor(0.0)})
    (sentence,) = counted.sentences()
    assert sentence.startswith("the solver of the objective ended short of its tolerance in 2 of the last 6 step(s)")
    assert not counted.sentences()
    counted.add({"m3g/unconverged": torch.tensor(1.0)})
    assert "the solver of m3g ended short of its tolerance in 1 of the last 1" in counted.sentences()[0]


def test_m3g_says_so_in_the_log(tmp_path, capsys):
    objective = {"kind": "m3g", "temperature": 0.002, "max_steps": 0}
    value = VALUE | {"run": str(tmp_path), "objective": objective, "evaluation": {"every": 0}}
    train(recipe.parse(value | {"checkpoint": {"every": 6}}))
    assert (
        "step 1: the solver of the objective ended short of its tolerance in 1 of the last 1" in capsys.readouterr().out
    )

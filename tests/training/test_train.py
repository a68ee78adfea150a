"""The program itself: runs that are killed, signalled to stop, resumed, and started wrongly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvpretrain.model.phase_timer import PHASES

RECIPE = """
run: {run}
data: {{kind: synthetic, samples: 200, eval_samples: 40, latent: 4, missing: 0.1}}
views:
  a: {{kind: vector, field: a, dim: 12, augment: {{noise: 0.1}}}}
  b: {{kind: vector, field: b, dim: 8}}
  c: {{kind: text, field: c, length: 24}}
towers:
  a: {{encoder: {{kind: mlp, input: 12, width: 16, dropout: 0.2}}}}
  b: {{encoder: {{kind: mlp, input: 8, width: 16}}}}
  c: {{encoder: {{kind: transformer, length: 24, width: 16, depth: 1, heads: 2, dropout: 0.1}}}}
dim: 8
objective: {{kind: infonce}}
batch: 24
steps: {steps}
loader: {{workers: 1}}
log: {{every: 1, tensorboard: false}}
checkpoint: {{every: 3, keep: 50}}
evaluation: {{every: 6}}
engine: {{device: cpu, threads: 1}}
"""


def recipe(folder: Path, name: str, steps: int = 13) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(run=folder / name, steps=steps))
    return path


def command(ranks: int, *arguments: object) -> list[str]:
    """What a user types, alone or on several ranks."""
    program = ["-m", "mvpretrain", "train", *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TERM": "dumb"}


def run(ranks: int, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *arguments), capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


def interrupted(log: Path, after: int, number: int, ranks: int, *arguments: object) -> int:
    """Start a run, send its whole process group a signal once the log shows that many steps; returns the exit code."""
    process = subprocess.Popen(
        command(ranks, *arguments), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not log.is_file() or log.read_text().count("\n") < after:
        assert process.poll() is None, f"ended with {process.returncode} before step {after}"
        assert time.monotonic() < until, f"no step {after} within two minutes"
        time.sleep(0.005)
    os.killpg(process.pid, number)
    return process.wait(60)


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; every step must be there once."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(1, len(steps) + 1)), steps
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def assert_timed(folder: Path) -> None:
    """Every step's line has its breakdown, which is no more than the step."""
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            phases = {name: record[f"time/{name}"] for name in PHASES}
            whole = 1000 * 24 / record["samples/s"]
            assert all(value > 0 for value in phases.values()) and sum(phases.values()) < whole, record
            assert record["data_wait"] == pytest.approx(phases["data"] / whole)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    assert losses(one) == losses(other)
    a, b = weights(one, step), weights(other, step)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("kind", "ranks", "micro_batch"), [("none", 1, "7"), ("zero2", 2, "null")])
def test_killed_run_resumes_bit_for_bit(tmp_path, kind, ranks, micro_batch):
    settings = (f"engine.kind={kind}", f"engine.micro_batch={micro_batch}")
    settings += ("teacher={momentum: 0.9, views: [a, b], queue: 48}",)
    whole, broken = recipe(tmp_path, "whole"), recipe(tmp_path, "broken")
    done = run(ranks, whole, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "whole")) == 13
    # 200 samples in batches of 24: step 8 is in mid-epoch and across a checkpoint at 6 that the log has outrun.
    interrupted(tmp_path / "broken" / "log.jsonl", 8, signal.SIGKILL, ranks, broken, *settings)
    assert not (tmp_path / "broken" / "checkpoints" / "step-00000013").exists()
    again = run(ranks, broken, *settings, "--resume")  # this recipe made the checkpoint, which ZeRO unpickles
    assert again.returncode == 0, again.stderr[-3000:]
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken", 13)
    assert_timed(tmp_path / "whole")


def test_signalled_to_stop_it_saves_exits_75_and_goes_on_with_other_ranks(tmp_path):
    long = recipe(tmp_path, "long", steps=400)
    code = interrupted(tmp_path / "long" / "log.jsonl", 5, signal.SIGTERM, 1, long, "engine.kind=none")
    assert code == 75
    last = sorted((tmp_path / "long" / "checkpoints").glob("step-*"))[-1]
    step = json.loads((last / "meta.json").read_text())["step"]
    assert step == len(losses(tmp_path / "long"))  # what was logged is what was saved
    done = run(2, tmp_path / "long", "--resume", "engine.kind=ddp", f"steps={step + 2}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "long")) == step + 2
    refused = run(1, tmp_path / "long", "engine.kind=none")
    assert refused.returncode == 2
    assert "already holds" in refused.stderr and "--resume" in refused.stderr

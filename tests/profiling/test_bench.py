"""`mvpretrain bench` on a small recipe: real steps, alone and on two ranks, and the search for a micro-batch."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mvpretrain import recipe
from mvpretrain.model.phase_timer import PHASES
from mvpretrain.profiling import bench
from mvpretrain.profiling.bench import Bench, Trial
from mvpretrain.types import View
from tests.ranks import without_jit

VALUE: dict[str, Any] = {
    "run": "run",
    "data": {"kind": "synthetic", "samples": 64, "eval_samples": 0},
    "views": {v: {"kind": "vector", "field": v, "dim": 8} for v in "ab"},
    "towers": {
        v: {"encoder": {"kind": "mlp", "input": 8, "width": 64, "depth": 1}, "head": {"layers": 1}} for v in "ab"
    },
    "objective": {"kind": "infonce"},
    "dim": 16,
    "batch": 32,
    "steps": 3,
    "loader": {"workers": 0},
    "engine": {"device": "cpu", "threads": 1},
}


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvpretrain.profiling.measure.SIDE", {"cpu": 64})


def settings(**changes: Any) -> recipe.Recipe:
    return recipe.parse(VALUE | changes)


def test_phases_add_up_and_nothing_is_written() -> None:
    found = bench.bench(settings(), steps=4, warmup=1)
    assert found and list(found.milliseconds) == [*PHASES, "rest"]
    assert all(found.milliseconds[phase] > 0 for phase in PHASES)
    assert (found.engine, found.device, found.precision, found.ranks, found.batch) == ("none", "cpu", "fp32", 1, 32)
    assert found.steps == 4 and found.samples == pytest.approx(32_000 / found.step)
    assert len(found.peaks) == 1 and found.peaks[0] >= found.baseline > 2**20
    # Two towers of a first layer, whose input needs no gradient, and a head; three products each, and the objective.
    towers = 2 * 2 * 32 * (2 * 8 * 64 + 3 * 64 * 16)
    assert towers < found.flops < 2 * towers
    assert found.utilization == pytest.approx(found.flops / found.step * 1000 / found.rate)
    assert not list(Path().iterdir())


def test_gradcache_encodes_twice() -> None:
    once, twice = (bench.bench(settings(engine=VALUE["engine"] | {"micro_batch": n}), 1, 0) for n in (None, 8))
    assert once and twice and 1.15 < twice.flops / once.flops < 1.5


def test_traces_and_tables(tmp_path: Path) -> None:
    found = bench.bench(settings(), steps=2, warmup=0, profile=tmp_path / "traces/here")
    assert found
    trace = json.loads((tmp_path / "traces/here/rank-0.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    bench.write_json(found, tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written.pop("utilization") == found.utilization and Bench(**written) == found
    console = Console(file=io.StringIO(), width=120)
    bench.print_bench(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "a step of 32 samples on 1 rank(s): none, cpu, fp32" in text
    assert all(phase in text for phase in (*PHASES, "rest", "samples/s:", "of the measured matrix rate"))


def on_a_rank(rank: int, folder: str, engine: dict[str, Any]) -> Bench | None:
    os.chdir(folder)
    without_jit()
    return bench.bench(settings(engine=VALUE["engine"] | engine), steps=2, warmup=1)


@pytest.mark.parametrize(("kind", "micro_batch"), [("ddp", None), ("zero1", None), ("zero2", 6), ("zero3", None)])
def test_ranks_tell_rank_0(ranks: Any, tmp_path: Path, kind: str, micro_batch: int | None) -> None:
    first, second = ranks(2).run(on_a_rank, str(tmp_path), {"kind": kind, "micro_batch": micro_batch})
    assert second is None
    assert (
        first.engine == kind
        and first.ranks == 2
        and first.batch == 32
        and len(first.peaks) == 2
        and min(first.peaks) > 2**20
    )
    assert first.milliseconds["gather"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "warmup"), [(0, 1), (-1, 0), (2, -1)])
def test_no_steps(steps: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"--steps {steps} --warmup {warmup}: time at least 1 step"):
        bench.bench(settings(), steps, warmup)


def test_steps_that_change_nothing_are_not_timed() -> None:
    with pytest.raises(FloatingPointError, match=r"no loss or gradient of 2 steps was finite.*optimizer.lr=1e\+30"):
        bench.bench(settings(optimizer={"lr": 1e30}), steps=2, warmup=2)


@pytest.mark.parametrize("most", [1, 2, 7, 8, 96, 100])
def test_the_search_finds_the_largest(most: int) -> None:
    for limit in range(most + 3):
        tried: list[int] = []

        def fits(n: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(n)
            return n <= limit

        found = bench.largest(fits, most)
        best = min(limit, most)
        assert 0 <= best - found <= best / 8, (limit, found)
        assert len(tried) == len(set(tried)) <= 2 + 2 * most.bit_length() and max(tried) <= most


def searched(monkeypatch: pytest.MonkeyPatch, limit: int, budget: int | None, **engine: Any) -> tuple[int, str]:
    def trial(chosen: recipe.Recipe, rows: int | None, budget: int | None) -> Trial:
        count = rows or chosen.batch // (chosen.engine.ranks or 1)
        return Trial(count, count * 2**20, 10.0 * count, count <= limit)

    monkeypatch.setattr(bench, "trial", trial)
    console = Console(file=io.StringIO(), width=120)
    found = bench.find_micro_batch(settings(engine=VALUE["engine"] | engine), budget, console)
    assert isinstance(console.file, io.StringIO)
    return found, " ".join(console.file.getvalue().replace("│", " ").split())


def test_the_search_says_what_it_tried_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = searched(monkeypatch, 5, 5 * 2**20)
    assert found == 5 and "set engine.micro_batch=5" in text and "within 5.0 MiB a rank" in text
    assert "4 4.0 MiB 40.0 fits" in text and "8 8.0 MiB 80.0 too large" in text
    found, text = searched(monkeypatch, 99, None, ranks=2)
    assert found == 16 and "the whole batch fits" in text
    with pytest.raises(ValueError, match="not even 1 row of 32 fits"):
        searched(monkeypatch, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="starts its ranks itself"):
        searched(monkeypatch, 5, None)


@pytest.mark.parametrize(("code", "said", "expected"), [
    (4, "mvpretrain: out of memory; ...", None), (-9, "", None), (1, "  exitcode  : 4 (pid: 77)", None),
    (1, "  exitcode  : -9 (pid: 77)", None), (0, "", 3000), (2, "mvpretrain: unknown key 'x'", "unknown key 'x'"),
    (1, "mvpretrain (rank 1): no shards\nChildFailedError", "no shards"), (1, "Segmentation fault", "Segmentation"),
    (1, "  x.py\n[rank1]: a.InductorError: no compiler\n\nSet TORCH_LOGS=", "^a.InductorError: no compiler$"),
])  # fmt: skip
def test_how_trials_end(monkeypatch: pytest.MonkeyPatch, code: int, said: str, expected: Any) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if code == 0:
            Path(command[command.index("--json") + 1]).write_text('{"peaks": [2000, 3000], "samples": 5.0}')
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    chosen = settings(engine=VALUE["engine"] | {"ranks": 2})
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            bench.trial(chosen, 4, 3000)
        return
    assert bench.trial(chosen, 4, 3000) == Trial(4, expected, 5.0 if expected else None, bool(expected))
    assert bench.trial(chosen, None, 2999) == Trial(16, expected, 5.0 if expected else None, False)
    assert "engine.micro_batch=4" in commands[0] and "engine.micro_batch=null" in commands[1]
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


class Frail(torch.nn.Module):
    """An encoder that is killed where it is given many rows, as the kernel kills what takes too much."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.dim, self.weight = most, 4, torch.nn.Parameter(torch.eye(8, 4))

    def forward(self, view: View) -> torch.Tensor:
        if len(view.data) > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        return view.data @ self.weight


def test_real_trials_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that really start, run, and are really killed: one row a rank fits, two do not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    tower = {"encoder": {"kind": "tests.profiling.test_bench:Frail", "most": 1}}
    chosen = settings(batch=4, engine=VALUE["engine"] | {"ranks": 2}, towers=VALUE["towers"] | {"a": tower})
    console = Console(file=io.StringIO(), width=120)
    assert bench.find_micro_batch(chosen, None, console) == 1
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(r"1 .*MiB .* fits", text) and re.search(r"2 .* - .* - .* too large", text)
    assert "set engine.micro_batch=1" in text

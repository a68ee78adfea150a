"""The log of a run that stops and goes on reads as if it had never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mvpretrain.loggers._metrics import MetricsLogger
from mvpretrain.loggers._settings import LogConfig


def opened(run: Path, start: int = 0, active: bool = True, **log: Any) -> MetricsLogger:
    return MetricsLogger(run, LogConfig(**{"tensorboard": False, **log}), {}, 10, start, active)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def written(run: Path, start: int, steps: range, active: bool = True, **log: Any) -> None:
    book = opened(run, start, active, **log)
    for step in steps:
        book.step(step)
        book.write(step, {"loss": 1 / step, "samples/s": 100.0 * step})
    book.close()


def test_one_line_a_record_with_its_numbers_exactly(tmp_path, capsys):
    written(tmp_path / "run", 0, range(1, 4))
    assert lines(tmp_path / "run") == [{"step": s, "loss": 1 / s, "samples/s": 100.0 * s} for s in (1, 2, 3)]
    assert "step 3  loss 0.3333  samples/s 300" in capsys.readouterr().out


def test_each_line_is_on_the_disk_before_the_next_step(tmp_path):
    book = opened(tmp_path / "run")
    book.write(1, {"loss": 2.0})
    assert lines(tmp_path / "run") == [{"step": 1, "loss": 2.0}]
    book.close()


def test_steps_beyond_the_resumed_one_and_half_a_line_are_cut(tmp_path):
    run = tmp_path / "run"
    written(run, 0, range(1, 8))
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.1')
    written(run, 5, range(6, 10))
    assert [record["step"] for record in lines(run)] == list(range(1, 10))


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 2, "parts": {"a": 1}', "{"])
def test_half_a_line_of_a_step_that_counts_is_cut_too(tmp_path, torn):
    run = tmp_path / "run"
    written(run, 0, range(1, 2))
    with (run / "log.jsonl").open("a") as file:
        file.write(torn)
    written(run, 2, range(3, 4))
    assert [record["step"] for record in lines(run)] == [1, 3]


def test_a_run_from_the_start_has_nothing_to_keep(tmp_path):
    written(tmp_path / "run", 0, range(1, 8))
    written(tmp_path / "run", 0, range(1, 3))
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2]


def test_a_loss_that_is_not_a_number_can_be_read_again(tmp_path):
    book = opened(tmp_path / "run")
    book.write(1, {"loss": math.nan, "grad_norm": math.inf})
    book.close()
    book = opened(tmp_path / "run", 1)
    book.close()
    assert math.isnan(lines(tmp_path / "run")[0]["loss"])


def test_other_ranks_write_nothing(tmp_path, capsys):
    written(tmp_path / "run", 0, range(1, 3), active=False)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_text_in_brackets_is_printed_as_it_is(tmp_path, capsys):
    book = opened(tmp_path / "run")
    book.say("views [bold] skipped: " + 60 * "long ")
    book.close()
    assert capsys.readouterr().out.startswith("views [bold] skipped: " + (60 * "long ").rstrip())


def test_tensorboard_has_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path / "run", 0, range(1, 6), tensorboard=True)
    written(tmp_path / "run", 3, range(4, 7), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]


def test_wandb_without_wandb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb='mine', but wandb is not installed; pip install wandb"):
        opened(tmp_path / "run", wandb="mine")

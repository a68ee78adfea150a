"""The log of a run that stops and goes on reads as if it had never stopped."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from mvpretrain.loggers import RunInfo
from mvpretrain.loggers._metrics import MetricsLogger
from mvpretrain.loggers._settings import LogConfig

RECIPE = {"run": "here", "log": {"every": 1}}


def opened(run: Path, start: int = 0, active: bool = True, **log: Any) -> MetricsLogger:
    config = LogConfig.model_validate({"tensorboard": False, **log})
    return MetricsLogger(config, RunInfo(run, RECIPE, 10, start), active)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def written(run: Path, start: int, steps: range, active: bool = True, **log: Any) -> None:
    logger = opened(run, start, active, **log)
    for step in steps:
        logger.step(step)
        logger.write(step, {"loss": 1 / step, "samples/s": 100.0 * step})
    logger.close()


def test_one_line_a_record_with_its_numbers_exactly(tmp_path, capsys):
    written(tmp_path / "run", 0, range(1, 4))
    assert lines(tmp_path / "run") == [{"step": s, "loss": 1 / s, "samples/s": 100.0 * s} for s in (1, 2, 3)]
    assert "step 3  loss 0.3333  samples/s 300" in capsys.readouterr().out


def test_each_line_is_on_the_disk_before_the_next_step(tmp_path):
    logger = opened(tmp_path / "run")
    logger.write(1, {"loss": 2.0})
    assert lines(tmp_path / "run") == [{"step": 1, "loss": 2.0}]
    logger.close()


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
    logger = opened(tmp_path / "run")
    logger.write(1, {"loss": math.nan, "grad_norm": math.inf})
    logger.close()
    logger = opened(tmp_path / "run", 1)
    logger.close()
    assert math.isnan(lines(tmp_path / "run")[0]["loss"])


def test_other_ranks_write_nothing(tmp_path, capsys):
    written(tmp_path / "run", 0, range(1, 3), active=False)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_text_in_brackets_is_printed_as_it_is(tmp_path, capsys):
    logger = opened(tmp_path / "run")
    logger.say("views [bold] skipped: " + 60 * "long ")
    logger.close()
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
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb='mine', but wandb is not installed; pip install wandb"):
        opened(tmp_path / "run", wandb="mine")
    assert not (tmp_path / "run/log.jsonl").exists()  # it refuses before anything is cut or written


def test_wandb_is_given_the_recipe_and_the_records(tmp_path, monkeypatch):
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    written(tmp_path / "run", 0, range(1, 3), wandb="mine")
    opening, *records, end = calls
    assert opening["config"] == RECIPE and opening["project"] == "mine" and opening["id"] == "run"
    assert [step for step, _ in records] == [1, 2] and end == "end"


class Own:
    """A user's logger: the calls it gets."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, note: str, fails: bool = False):
        self.calls.append(note)
        self.fails = fails

    def start(self, info: RunInfo) -> None:
        if self.fails:
            raise ValueError("no room for another log")
        self.calls.append((info.folder.name, info.recipe, info.steps, info.start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append((step, dict(values)))

    def close(self) -> None:
        self.calls.append("closed")


class Chatty(Own):
    def step(self, number: int) -> None:
        self.calls.append(number)

    def say(self, text: str) -> None:
        self.calls.append(text)


HERE = "tests.loggers.test_metrics"


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    Own.calls.clear()


def test_a_users_logger_gets_every_record(tmp_path):
    written(tmp_path / "run", 1, range(2, 4), also=[{"kind": f"{HERE}:Own", "note": "built"}])
    records = [(s, {"loss": 1 / s, "samples/s": 100.0 * s}) for s in (2, 3)]
    assert Own.calls == ["built", ("run", RECIPE, 10, 1), *records, "closed"]
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3]  # beside the others


def test_a_logger_that_wants_steps_and_text_gets_them(tmp_path):
    logger = opened(tmp_path / "run", also=[{"kind": f"{HERE}:Chatty", "note": "built"}])
    logger.step(1)
    logger.say("hello")
    logger.close()
    assert Own.calls[2:] == [1, "hello", "closed"]


def test_where_one_refuses_those_before_it_are_closed(tmp_path):
    both = [{"kind": f"{HERE}:Own", "note": "one"}, {"kind": f"{HERE}:Own", "note": "two", "fails": True}]
    with pytest.raises(ValueError, match="no room for another log"):
        opened(tmp_path / "run", also=both)
    assert Own.calls[0] == "one" and Own.calls[-2:] == ["two", "closed"]


def test_a_class_that_is_no_logger_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"'pathlib:PurePath' has no start, write, close; see mvpretrain\.loggers"):
        opened(tmp_path / "run", also=[{"kind": "pathlib:PurePath"}])

"""The registry of metric loggers: where a run's numbers go. One file a kind; a recipe adds them by `log.also`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mvpretrain.registry import External, Kind, Registry, build_external


class RunInfo(NamedTuple):
    """What loggers are given before the first step."""

    folder: Path
    recipe: Mapping[str, Any]  # resolved: plain values, as in the run's recipe.yaml
    steps: int  # of the whole run
    start: int  # the step after which it goes on; records of later steps are of a run that was interrupted


@runtime_checkable
class Logger(Protocol):
    """Takes one record of scalars each logged step. Only rank 0 has loggers."""

    def start(self, info: RunInfo) -> None:
        """Called once, before the first step. ValueError: what the user must mend."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record: values by name. A step may have two, its losses and an evaluation."""
        ...

    def close(self) -> None:
        """Called once at the end, also after an error; not where `start` has failed."""
        ...


@runtime_checkable
class CountsSteps(Protocol):
    """Optional: a logger that wants to hear of every step, logged or not."""

    def step(self, number: int) -> None: ...


@runtime_checkable
class ShowsText(Protocol):
    """Optional: a logger that shows sentences to a person."""

    def say(self, text: str) -> None: ...


class LoggerConfig(Kind):
    """Settings of a logger."""

    def build(self) -> Logger:
        raise TypeError(f"{type(self).__name__} must define build")


class ExternalLogger(LoggerConfig, External):
    """A user's own class with `start`, `write` and `close`, by import path."""

    def build(self) -> Logger:
        logger = build_external(self)
        if not isinstance(logger, Logger):
            lacking = [name for name in ("start", "write", "close") if not callable(getattr(logger, name, None))]
            raise ValueError(f"logger kind {self.kind!r} has no {', '.join(lacking)}; see mvpretrain.loggers.Logger")
        return logger


registry = Registry("mvpretrain.loggers", LoggerConfig, ExternalLogger, "logger")

"""The console: a progress bar where it is a terminal, a line a record where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvpretrain.loggers import LoggerConfig, RunInfo

SHOWN = ("loss", "temperature", "samples/s")  # what the progress bar has room for


class ProgressConfig(LoggerConfig):
    """Steps done, time left, and the latest of a few values."""

    kind: Literal["progress"] = "progress"

    def build(self) -> ProgressLogger:
        return ProgressLogger()


class ProgressLogger:
    def start(self, info: RunInfo) -> None:
        self.console = Console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.line = self.bar.add_task(info.folder.name, total=info.steps, completed=info.start, note="")
        self.bar.start()

    def step(self, number: int) -> None:
        self.bar.update(self.line, completed=number)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        note = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        self.bar.update(self.line, note=note)
        if not self.console.is_terminal and note:
            self.say(f"step {step}  {note}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()

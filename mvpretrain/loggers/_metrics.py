"""What a run writes down: progress bar, log.jsonl, TensorBoard, wandb. Rank 0 alone has one that writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvpretrain.loggers._settings import LogConfig

SHOWN = ("loss", "temperature", "samples/s")  # what the progress bar has room for


class MetricsLogger:
    """One line a logged step, to every place that the recipe names.

    Lines after the step that a run resumes from are cut off, so that the log reads as if it had never stopped.
    """

    def __init__(self, run: Path, config: LogConfig, resolved: Mapping[str, Any], steps: int, start: int, active: bool):
        self.active, self.path = active, run / "log.jsonl"
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.wandb = _wandb(run, config.wandb, resolved) if config.wandb else None  # first: it may refuse
        self._cut(start)
        self.file = self.path.open("a")
        self.board = _tensorboard(run, start) if config.tensorboard else None
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
        self.line = self.bar.add_task(run.name, total=steps, completed=start, note="")
        self.bar.start()

    def step(self, number: int) -> None:
        """Move the bar."""
        if self.active:
            self.bar.update(self.line, completed=number)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record of scalars."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)
        note = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        self.bar.update(self.line, note=note)
        if not self.console.is_terminal and note:
            self.say(f"step {step}  {note}")

    def say(self, text: str) -> None:
        """A sentence to the console."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.active:
            self.bar.stop()
            self.file.close()
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()

    def _cut(self, start: int) -> None:
        if self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            # A killed process may have left half a line.
            whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
            self.path.write_text("".join(whole))


def _tensorboard(run: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def _wandb(run: Path, project: str, resolved: Mapping[str, Any]) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"log.wandb={project!r}, but wandb is not installed; pip install wandb") from error
    return wandb.init(project=project, dir=run, name=run.name, id=run.name, resume="allow", config=dict(resolved))

"""`log.jsonl` in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mvpretrain.loggers import LoggerConfig, RunInfo


class JsonlConfig(LoggerConfig):
    """One JSON object a line: `step` and the values by name."""

    kind: Literal["jsonl"] = "jsonl"

    def build(self) -> JsonlLogger:
        return JsonlLogger()


class JsonlLogger:
    """Each line is on disk before the next step.

    Lines after the step from which a run goes on are cut off, so that the log reads as if it had never stopped.
    """

    def start(self, info: RunInfo) -> None:
        path = info.folder / "log.jsonl"
        cut(path, info.start)
        self.file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def cut(path: Path, last: int) -> None:
    """Remove the records of steps after `last`, and half a line that a killed process has left."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last]
        path.write_text("".join(whole))

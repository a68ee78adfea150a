"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

from mvpretrain.loggers import LoggerConfig, RunInfo


class WandbConfig(LoggerConfig):
    """A run of this `project`, of the name of the run's folder, with the resolved recipe as its config."""

    kind: Literal["wandb"] = "wandb"
    project: str

    def build(self) -> WandbLogger:
        return WandbLogger(self.project)


class WandbLogger:
    def __init__(self, project: str):
        self.project = project

    def start(self, info: RunInfo) -> None:
        try:
            wandb: Any = import_module("wandb")  # the library, where type checkers would find this file
        except ImportError as error:
            raise ValueError(f"log.wandb={self.project!r}, but wandb is not installed; pip install wandb") from error
        name = info.folder.name
        self.run = wandb.init(
            project=self.project, dir=info.folder, name=name, id=name, resume="allow", config=dict(info.recipe)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()

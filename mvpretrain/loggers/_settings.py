"""What a recipe says of logging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, SerializeAsAny

from mvpretrain.config import Config
from mvpretrain.loggers import LoggerConfig, registry


class LogConfig(Config):
    """A record every `every` steps to the console, log.jsonl, TensorBoard and wandb; `wandb` names a project.

    `also` adds loggers, each by its `kind` and settings: a file of mvpretrain/loggers, or package.module:Class.
    """

    every: int = Field(default=10, ge=1)
    tensorboard: bool = True
    wandb: str | None = None
    also: tuple[Annotated[SerializeAsAny[LoggerConfig], registry], ...] = ()

    def loggers(self) -> Iterator[LoggerConfig]:
        """Settings of every logger; those that may refuse come before those that write to the run's folder."""
        if self.wandb:
            yield registry.parse({"kind": "wandb", "project": self.wandb})
        yield from self.also
        yield registry.parse({"kind": "jsonl"})
        if self.tensorboard:
            yield registry.parse({"kind": "tensorboard"})
        yield registry.parse({"kind": "progress"})

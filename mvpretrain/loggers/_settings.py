"""What a recipe says of logging."""

from __future__ import annotations

from pydantic import Field

from mvpretrain.config import Config


class LogConfig(Config):
    """Every so many steps a line to the console, log.jsonl and TensorBoard; `wandb` names a project."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = True
    wandb: str | None = None

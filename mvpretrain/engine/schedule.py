"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from mvpretrain.config import Config


class ScheduleConfig(Config):
    """The factor on every rate: linear warm-up over `warmup` steps, then `cosine` to `final`, or `constant`."""

    kind: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """The factor for the step of this number, the first being 0: a pure function, so that nothing must be saved."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor

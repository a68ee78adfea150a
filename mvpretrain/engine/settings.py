"""What a recipe says of the engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mvpretrain.config import Config
from mvpretrain.registry import refuse_untrusted


class EngineConfig(Config):
    """What runs the steps.

    `kind`: `none` (one process), `ddp`, `zero0` to `zero3` (DeepSpeed), or `auto`: `none` for one process, else `ddp`.
    `precision`: `auto` is bf16 on GPUs and fp32 on CPUs. `ranks`: the number of processes that must be there; a
    launcher that silently starts fewer is then refused. `clip`: the largest gradient norm, null for none.

    `micro_batch`: so many of a rank's rows are encoded at a time, whatever the batch (GradCache, Gao et al. 2021), at
    the price of encoding all of them twice; null: all at once. Batch statistics are then those of a micro-batch.
    `first_pass: bf16` encodes them the first time, for the embeddings alone, in lower precision.

    `compile` runs the towers through torch.compile (a C++ compiler is needed on CPUs). `channels_last` lays out
    convolutions' weights so that images are worked on pixel by pixel; DeepSpeed cannot hold such weights.
    """

    kind: Literal["auto", "none", "ddp", "zero0", "zero1", "zero2", "zero3"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int | None = Field(default=None, ge=1)
    clip: float | None = Field(default=1.0, gt=0)
    micro_batch: int | None = Field(default=None, ge=1)
    first_pass: Literal["same", "bf16"] = "same"
    compile: bool = False
    channels_last: bool = False
    offload: bool = False
    threads: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = {}  # merged into DeepSpeed's own configuration

    @field_validator("options")
    @classmethod
    def _trusted(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value:
            refuse_untrusted(f"engine.options, with names such as {next(iter(value))!r} that DeepSpeed may import,")
        return value

    @model_validator(mode="after")
    def _cross_check(self) -> EngineConfig:
        if self.first_pass != "same" and self.micro_batch is None:
            raise ValueError(
                f"first_pass={self.first_pass} is about the first of two passes, and without micro_batch there is one; "
                "set micro_batch=ROWS, or first_pass=same"
            )
        return self

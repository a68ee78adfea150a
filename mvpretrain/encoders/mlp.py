"""A multi-layer perceptron for vectors, or for anything small enough to be laid flat."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.types import View


class MLPConfig(EncoderConfig):
    """`input` numbers an item, after laying it flat, to `width` through `depth` hidden layers."""

    kind: Literal["mlp"] = "mlp"
    input: PositiveInt
    width: PositiveInt = 256
    depth: PositiveInt = 2
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: Literal["layer", "none"] = "layer"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"input": 80, "width": 16}]

    def example_view(self, rows: int) -> View:
        length = math.gcd(self.input, 20)
        data = torch.randn(rows, length, self.input // length)
        return View(data, torch.ones(rows, length, dtype=torch.bool))

    def build(self) -> MLP:
        return MLP(self)


class MLP(nn.Module):
    """`depth` times linear, norm, GELU, dropout: `b *item` to `b width`. Masked positions are read as zeros.

    ValueError: an item has not `input` numbers.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.input, self.dim = config.input, config.width
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, config.width),
                nn.LayerNorm(config.width) if config.norm == "layer" else nn.Identity(),
                nn.GELU(),
                nn.Dropout(config.dropout),
            )
            for width in [config.input] + [config.width] * (config.depth - 1)
        )

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        x = view.data
        if view.mask is not None:
            x = x.masked_fill(~view.mask.reshape(*view.mask.shape, *[1] * (x.ndim - 2)), 0)
        x = rearrange(x, "b ... -> b (...)")
        check_items(x, (self.input,), "mlp", "set its input to the item's number of values")
        x = x.to(next(self.parameters()).dtype)
        for block in self.blocks:
            x = block(x)
        return x if x.dtype == torch.float64 else x.float()

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)

"""Strided convolutions and a transformer for series: sensor channels over time, or a log-mel spectrogram."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.encoders._layers import Block
from mvpretrain.types import View


class SeriesConfig(EncoderConfig):
    """`channels` numbers at each time step. One convolution for each of `strides`; their product is the number of time
    steps that one transformer position stands for."""

    kind: Literal["series"] = "series"
    channels: PositiveInt
    strides: tuple[PositiveInt, ...] = (2, 2)
    kernel: PositiveInt = 5
    width: PositiveInt = 192
    depth: PositiveInt = 4
    heads: PositiveInt = 3
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _covers(self) -> SeriesConfig:
        if not self.strides:
            raise ValueError("strides is empty; (1,) keeps every time step")
        if self.kernel % 2 == 0 or self.kernel < max(self.strides):
            raise ValueError(
                f"kernel {self.kernel} must be odd and no less than the largest stride {max(self.strides)}"
            )
        return self

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"channels": 4, "strides": (2, 3), "width": 16, "depth": 2, "heads": 2}]

    def example_view(self, rows: int) -> View:
        return View(torch.randn(rows, 20, self.channels), torch.ones(rows, 20, dtype=torch.bool))

    def build(self) -> Series:
        return Series(self)


class Series(nn.Module):
    """`b n channels` of any length n to `b width`: the mean over the positions whose centre is data.

    Padding, where the mask is False, does not change the result: it is zero before every convolution, as beyond the
    end of a series that is not padded, and norms look at one time step at a time. ValueError: other channels.
    """

    def __init__(self, config: SeriesConfig):
        super().__init__()
        self.dim, self.channels = config.width, config.channels
        inputs = [config.channels] + [config.width] * (len(config.strides) - 1)
        self.convs = nn.ModuleList(
            nn.Conv1d(c, config.width, config.kernel, stride, padding=config.kernel // 2)
            for c, stride in zip(inputs, config.strides)
        )
        self.conv_norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in config.strides)
        self.strides = config.strides
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, (None, self.channels), "series", "set its channels to those of the view")
        x, mask = self.stem(view.data.to(self.norm.weight.dtype), view.mask)
        mask = _layers.never_empty(mask)
        x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return _layers.masked_mean(self.norm(x), mask)

    def stem(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"] | None]:
        """The strided convolutions, and the mask at their output: position j is centred on step j * stride."""
        x = _zeroed(x, mask)
        for conv, norm, stride in zip(self.convs, self.conv_norms, self.strides):
            x = rearrange(conv(rearrange(x, "b n c -> b c n")), "b d m -> b m d")
            mask = None if mask is None else mask[:, ::stride]
            x = _zeroed(gelu(norm(x)), mask)
        return x, mask

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)


def _zeroed(x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n d"]:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def sinusoids(length: int, width: int, device: torch.device) -> Float[Tensor, "n d"]:
    """Sines, then cosines, of wavelengths 2 pi to 20,000 pi positions (Vaswani et al. 2017, 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]

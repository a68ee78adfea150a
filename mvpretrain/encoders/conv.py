"""A small residual convolutional network for small images."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import relu

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.types import View


class ConvConfig(EncoderConfig):
    """Images of about 8 x 8 to 64 x 64: `stages` of `depth` residual blocks each.

    The first stage has `width` channels at full size; each later one halves the side and doubles the channels.
    `norm: group` takes statistics within one image. Those of `batch` are of one rank's rows, filler for missing views
    included, so that the result depends on how the batch is split; they can also give positives away (He et al. 2020).
    """

    kind: Literal["conv"] = "conv"
    channels: PositiveInt = 3
    width: PositiveInt = Field(32, multiple_of=8)
    stages: PositiveInt = 3
    depth: PositiveInt = 1
    norm: Literal["group", "batch"] = "group"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"width": 8, "stages": 2}, {"width": 8, "stages": 2, "norm": "batch"}]

    def example_view(self, rows: int) -> View:
        return View(torch.randn(rows, self.channels, 16, 16))

    def build(self) -> Conv:
        return Conv(self)


class Conv(nn.Module):
    """Stem, pre-activation residual blocks (He et al. 2016), norm, mean over positions: `b c h w` to `b dim`.

    dim = width * 2^(stages - 1). ValueError: other channels, or a side below 2^(stages - 1).
    """

    def __init__(self, config: ConvConfig):
        super().__init__()
        self.channels, self.least = config.channels, 2 ** (config.stages - 1)
        self.dim = config.width * self.least
        self.stem = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=False)
        widths = [config.width * 2**stage for stage in range(config.stages) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(Residual(a, b, config.norm) for a, b in zip([config.width, *widths], widths))
        self.norm = _norm(config.norm, self.dim)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, (self.channels, None, None), "conv", "set its channels to those of the image")
        if min(view.data.shape[2:]) < self.least:
            side = min(view.data.shape[2:])
            raise ValueError(f"conv encoder needs sides of at least {self.least}, got {side}; give it fewer stages")
        x = self.stem(view.data.to(self.stem.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return reduce(relu(self.norm(x)).float(), "b c h w -> b c", "mean")

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); a change of channels halves the side."""

    def __init__(self, before: int, after: int, norm: str):
        super().__init__()
        stride = 1 if before == after else 2
        self.norm_1, self.norm_2 = _norm(norm, before), _norm(norm, after)
        self.conv_1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e k l"]:
        y = self.conv_1(relu(self.norm_1(x)))
        return self.short(x) + self.conv_2(relu(self.norm_2(y)))


def _norm(kind: str, channels: int) -> nn.Module:
    # Groups of 8 channels: on the last, smallest maps a group of one channel would hold little but its own mean.
    return nn.GroupNorm(channels // 8, channels) if kind == "group" else nn.BatchNorm2d(channels)

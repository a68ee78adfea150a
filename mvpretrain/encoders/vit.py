"""A small vision transformer for small images.

Written out and not timm's (kind `timm` has that): its last block computes the class token alone, and the runs and
exports that exist depend on its random draws and on the names of its weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.encoders._layers import Block
from mvpretrain.types import View


class ViTConfig(EncoderConfig):
    """Square images of side `image_size` in squares of side `patch`; `pool` reads the class token or the patches."""

    kind: Literal["vit"] = "vit"
    image_size: PositiveInt = 32
    patch: PositiveInt = 4
    channels: PositiveInt = 3
    width: PositiveInt = 192
    depth: PositiveInt = 6
    heads: PositiveInt = 3
    dropout: float = Field(0.0, ge=0, lt=1)
    pool: Literal["class", "mean"] = "class"

    @model_validator(mode="after")
    def _whole_patches(self) -> ViTConfig:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch {self.patch}; change one of them")
        return self

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"image_size": 16, "width": 16, "depth": 2, "heads": 2},
            {"image_size": 16, "width": 16, "depth": 2, "heads": 2, "pool": "mean"},
        ]

    def example_view(self, rows: int) -> View:
        return View(torch.randn(rows, self.channels, self.image_size, self.image_size))

    def build(self) -> ViT:
        return ViT(self)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) with learned positions: `b c h w` to `b width`.

    ValueError: other channels or another side than in the settings.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dim, self.patch = config.width, config.patch
        self.item = (config.channels, config.image_size, config.image_size)
        self.embed = nn.Linear(config.channels * config.patch**2, config.width)
        extra = 1 if config.pool == "class" else 0
        self.token = nn.Parameter(0.02 * torch.randn(config.width)) if extra else None
        self.positions = nn.Parameter(
            0.02 * torch.randn((config.image_size // config.patch) ** 2 + extra, config.width)
        )
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, self.item, "vit", "resize the view, or set the encoder's image_size and channels")
        data = view.data.to(self.embed.weight.dtype)
        x = self.embed(rearrange(data, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch))
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positions
        *early, last = self.blocks
        for block in early:
            x = block(x)
        if self.token is None:
            return _layers.masked_mean(self.norm(last(x)), None)
        # Nobody reads what the last block would give for the patches.
        return self.norm(last(x, first=1)[:, 0]).float()

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)

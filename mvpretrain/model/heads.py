"""Projection heads, and rows of length one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain.config import Config


class HeadConfig(Config):
    """The projection from an encoder's output to the shared space; 0 layers is none, 1 is linear, more are an MLP."""

    layers: int = Field(default=1, ge=0)
    width: int | None = None
    norm: str = Field(default="layer", pattern="^(none|layer|batch)$")

    def check(self, heads: int) -> None:
        """ValueError where there cannot be so many of this projection."""
        if heads > 1 and self.layers == 0:
            raise ValueError(
                f"a head of 0 layers has no weights, and the objective asks for heads={heads}, each with its own; set "
                "layers=1 or more"
            )


def head(inputs: int, outputs: int, config: HeadConfig) -> nn.Module:
    """The projection head: linear layers with a norm and GELU between them."""
    if config.layers == 0:
        if inputs != outputs:
            raise ValueError(
                f"a head of 0 layers needs dim equal to the encoder's {inputs}, got dim={outputs}; set dim={inputs}"
            )
        return nn.Identity()
    norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    width = config.width or inputs
    layers: list[nn.Module] = []
    for _ in range(config.layers - 1):
        layers += [nn.Linear(inputs, width), norms[config.norm](width), nn.GELU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs, bias=False))


class Heads(nn.Module):
    """Heads of one make, each with its own weights; their outputs stand side by side: `b inputs -> b (heads dim)`."""

    def __init__(self, each: Sequence[nn.Module]):
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([one(x) for one in self.each], dim=1)


def projection(inputs: int, dim: int, config: HeadConfig, heads: int) -> nn.Module:
    """So many heads of `dim` outputs each: `b inputs -> b (heads dim)`. ValueError: what HeadConfig.check refuses."""
    config.check(heads)
    if heads == 1:
        return head(inputs, dim, config)
    return Heads([head(inputs, dim, config) for _ in range(heads)])


def unit(x: Tensor, heads: int = 1) -> Tensor:
    """Rows of length one, in float32 at least: bfloat16 has three digits, and similarities are divided by tau.

    Each of H heads has the length 1 / sqrt(H), so that the product of two rows is the mean of their heads' cosines.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if heads == 1:
        return normalize(x, dim=1)
    return normalize(x.unflatten(1, (heads, -1)), dim=2).flatten(1) / heads**0.5

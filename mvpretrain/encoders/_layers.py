"""Parts that several encoders are built from: the transformer block, masks and pooling, blocks and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from mvpretrain.types import View


class Block(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020): x + attention(norm(x)), then x + mlp(norm(x)).

    `x` is `b n width`; `mask` is `b n`, True at positions that may be attended to. Dropout follows both branches. With
    `first`, only so many positions at the beginning are computed, from all. ValueError: the heads do not divide the
    width.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split among {heads} heads; make it a multiple of heads")
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None, first: int | None = None
    ) -> Float[Tensor, "b m d"]:
        heads = rearrange(self.qkv(self.attention_norm(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        queries, keys, values = heads.unbind(0)
        hidden = None if mask is None else rearrange(mask, "b n -> b 1 1 n")
        seen = scaled_dot_product_attention(queries[:, :, :first], keys, values, attn_mask=hidden)
        x = x[:, :first] + self.dropout(self.out(rearrange(seen, "b h n d -> b n (h d)")))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def never_empty(mask: Bool[Tensor, "b n"] | None) -> Bool[Tensor, "b n"] | None:
    """The mask, with rows that have no data at all taken as full: a softmax or a mean over nothing is not a number."""
    return None if mask is None else mask | ~mask.any(dim=1, keepdim=True)


def without_padding(view: View) -> View:
    """A view of `b n` ids, cut after its longest row (to a multiple of 8, so that few lengths occur)."""
    if view.mask is None or torch.compiler.is_compiling():  # a length that depends on the data would break the graph
        return view
    there = view.mask.any(dim=0).nonzero()
    most = 8 * (int(there[-1]) // 8 + 1) if len(there) else 8
    return view.shorten(most)


def masked_mean(x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b d"]:
    """Mean over the positions where `mask` is True, in float32; every row must have one."""
    x = x.float()
    if mask is None:
        return reduce(x, "b n d -> b d", "mean")
    there = rearrange(mask, "b n -> b n 1")
    return reduce(x.masked_fill(~there, 0), "b n d -> b d", "sum") / reduce(there.float(), "b n 1 -> b 1", "sum")


def checkpoint_activations(blocks: Iterable[nn.Module] | None) -> None:
    """Let each block keep its inputs only and compute the rest again in backward. ValueError: no blocks are known."""
    if blocks is None:
        raise ValueError("this encoder's repeated blocks are not known (None); do not ask it to recompute activations")
    for block in blocks:
        # The instance's forward is replaced, not the module wrapped: names in the state dict stay as they are.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def repeated_blocks(model: nn.Module) -> list[nn.Module] | None:
    """The repeated parts of a library's model, input side first, by the names libraries use; None where none fits."""
    names = ("resblocks", "blocks", "block", "layers", "layer", "stages", "h")
    found = [
        (path.count("."), part)
        for path, part in model.named_modules()
        if path.split(".")[-1] in names and isinstance(part, nn.ModuleList | nn.Sequential)
    ]
    if found:
        return list(min(found, key=lambda entry: entry[0])[1])
    stages = [part for path, part in model.named_modules() if re.fullmatch(r"(.*\.)?layer[1-4]", path)]
    return [block for stage in stages for block in stage.children()] or None


def plain_parameters(module: nn.Module) -> None:
    """Make every parameter contiguous and at least one-dimensional, in place: DeepSpeed 0.19.8 fails on others."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                part.register_parameter(name, nn.Parameter(parameter.data.reshape(1), parameter.requires_grad))
            elif not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()

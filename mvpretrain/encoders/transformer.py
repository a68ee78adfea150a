"""A transformer over token ids."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items
from mvpretrain.encoders._layers import Block
from mvpretrain.types import View


class TransformerConfig(EncoderConfig):
    """Up to `length` ids below `vocabulary`; the default is that of the byte tokenizer, 256 bytes and 3 specials."""

    kind: Literal["transformer"] = "transformer"
    vocabulary: PositiveInt = 259
    length: PositiveInt = 128
    width: PositiveInt = 192
    depth: PositiveInt = 4
    heads: PositiveInt = 3
    dropout: float = Field(0.0, ge=0, lt=1)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"length": 8, "width": 16, "depth": 2, "heads": 2}]

    def example_view(self, rows: int) -> View:
        length = min(self.length, 6)
        return View(torch.randint(1, self.vocabulary, (rows, length)), torch.ones(rows, length, dtype=torch.bool))

    def build(self) -> Transformer:
        return Transformer(self)


class Transformer(nn.Module):
    """Every token attends to every token there is; the mean over those is returned: `b n` ids to `b width`.

    Padding, where the mask is False, does not change the result. ValueError: more ids than `length`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dim = config.width
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, (None,), "transformer", "give it a text view")
        length, most = view.data.shape[1], len(self.positions)
        if length > most:
            raise ValueError(f"transformer encoder takes up to {most} tokens, got {length}; raise its length")
        data, mask = _layers.without_padding(view)
        mask = _layers.never_empty(mask)
        x = self.tokens(data) + self.positions[: data.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return _layers.masked_mean(self.norm(x), mask)

    def checkpoint_activations(self) -> None:
        _layers.checkpoint_activations(self.blocks)

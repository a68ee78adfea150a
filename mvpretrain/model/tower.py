"""An encoder with its head or heads, and how it is trained: `View -> b (heads dim)`."""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field, SerializeAsAny
from safetensors.torch import load_file
from torch import Tensor, nn

from mvpretrain import encoders
from mvpretrain.config import Config, errors_at
from mvpretrain.encoders import EncoderConfig
from mvpretrain.model.heads import HeadConfig, projection, unit
from mvpretrain.types import Encoder, RecomputesActivations, View


class TowerConfig(Config):
    """An encoder with its head, and how it is trained.

    `freeze` stops the encoder's training, but for its last `train_blocks` blocks; the head always trains. `lr` and
    `weight_decay` are this tower's own. `weights` starts the tower from a safetensors file of an exported view.
    `length_groups` sorts texts by length into so many groups, each encoded without the padding after its longest.
    """

    encoder: Annotated[SerializeAsAny[EncoderConfig], encoders.registry]
    head: HeadConfig = HeadConfig()
    freeze: bool = False
    train_blocks: int = Field(default=0, ge=0)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    checkpoint_activations: bool = False
    length_groups: int = Field(default=1, ge=1)
    weights: str | None = None


class Tower(nn.Module):
    """An encoder and its head, or several heads side by side: `View -> b (heads dim)`, not normalised.

    ValueError: settings that cannot be built; the text begins with `key`, the tower's key in a recipe.
    """

    def __init__(self, config: TowerConfig, dim: int, heads: int = 1, key: str = "tower"):
        super().__init__()
        self.config, self.heads = config, heads
        with errors_at(f"{key}.encoder"):
            self.encoder = config.encoder.build()
        with errors_at(f"{key}.head"):
            self.head = projection(cast(Encoder, self.encoder).dim, dim, config.head, heads)
        if config.weights:
            load_weights(self, config.weights, f"{key}.weights")
        with errors_at(key):
            if config.freeze:
                freeze(self.encoder, config.train_blocks)
            if config.checkpoint_activations:
                recompute_activations(self.encoder, config.encoder.kind)

    def forward(self, view: View) -> Tensor:
        if self.config.length_groups > 1:
            return self.head(by_length(self.encoder, view, self.config.length_groups))
        return self.head(self.encoder(view))

    def embed(self, view: View) -> Tensor:
        """Unit rows: `b (heads dim)`, float32 (float64 stays)."""
        return unit(self(view), self.heads)

    def embed_features(self, features: Tensor) -> Tensor:
        """Unit rows from the encoder's output: `b width -> b (heads dim)`."""
        return unit(self.head(features), self.heads)

    def train(self, mode: bool = True) -> Tower:
        """A wholly frozen encoder stays in evaluation mode, so that its statistics and dropout are frozen too."""
        super().train(mode)
        if self.config.freeze and not self.config.train_blocks:
            self.encoder.train(False)
        return self


def by_length(encoder: nn.Module, view: View, groups: int) -> Tensor:
    """The encoder's vectors, computed in groups of rows of like length, each cut after its longest: `b dim`.

    Every rank makes `groups` calls, whatever its rows: engines that gather weights by module would deadlock otherwise.
    ValueError: a view without lengths.
    """
    if view.mask is None or view.data.shape[:2] != view.mask.shape:
        raise ValueError(
            f"length_groups={groups} is for views whose first axis is their length, such as text; this one is "
            f"{'x'.join(map(str, view.data.shape[1:]))} a sample; set length_groups=1 for its tower"
        )
    positions = torch.arange(1, view.mask.shape[1] + 1, device=view.mask.device)
    lengths = (view.mask * positions).amax(dim=1).clamp_min(1)
    order = lengths.argsort()
    found = []
    for rows in order.tensor_split(groups):
        taken = rows if len(rows) else order[:1]
        longest = int(lengths[taken].max())
        found.append(encoder(view.shorten(longest).rows(taken))[: len(rows)])
    return torch.cat(found)[order.argsort()]


def load_weights(tower: Tower, path: str, key: str) -> None:
    """Start from the model.safetensors of an exported view. ValueError: not there, or of another tower."""
    weights = load_file(encoders.local_file(path, key))
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{key}={path!r} is of another encoder or head: {reason}") from error


def recompute_activations(encoder: nn.Module, kind: str) -> None:
    """Switch on that the encoder's blocks keep no activations. ValueError: it has no such switch."""
    if not isinstance(encoder, RecomputesActivations):
        raise ValueError(
            f"encoder kind {kind!r} has no checkpoint_activations(); set checkpoint_activations=false for its tower"
        )
    encoder.checkpoint_activations()


def freeze(encoder: nn.Module, train_blocks: int) -> None:
    """Stop an encoder's training but for its last blocks. ValueError: more blocks asked for than it has."""
    encoder.requires_grad_(False)
    if train_blocks:
        # By name, not by a protocol: isinstance finds no submodules from Python 3.12 on.
        blocks = list(getattr(encoder, "blocks", None) or ())
        if len(blocks) < train_blocks:
            raise ValueError(
                f"train_blocks={train_blocks}, but {type(encoder).__name__} has {len(blocks)} known blocks"
            )
        for block in blocks[-train_blocks:]:
            block.requires_grad_(True)

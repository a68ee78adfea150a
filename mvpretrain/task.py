"""Towers, heads and objective as the one module that an engine wraps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain import encoders
from mvpretrain.config import Config
from mvpretrain.encoders import EncoderConfig
from mvpretrain.exchange import Exchange, share
from mvpretrain.numerics import geometry
from mvpretrain.types import Batch, Embeddings, Encoder, Losses, Objective, View

HEALTH_ROWS = 256  # rows that the per-step health figures look at: enough for two digits, nothing in time


class HeadConfig(Config):
    """The projection from an encoder's output to the shared space; 0 layers is none, 1 is linear, more are an MLP."""

    layers: int = Field(default=1, ge=0)
    width: int | None = None
    norm: str = Field(default="layer", pattern="^(none|layer|batch)$")


class TowerConfig(Config):
    """An encoder with its head, and how it is trained.

    `freeze` stops the encoder's training, but for its last `train_blocks` blocks; the head always trains. `lr` and
    `weight_decay` are this tower's own. `weights` starts the tower from a safetensors file of an exported view.
    """

    encoder: Annotated[
        SerializeAsAny[EncoderConfig], BeforeValidator(encoders.door.parse), WithJsonSchema({"door": "encoder"})
    ]
    head: HeadConfig = HeadConfig()
    freeze: bool = False
    train_blocks: int = Field(default=0, ge=0)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    checkpoint_activations: bool = False
    weights: str | None = None


class Tower(nn.Module):
    """An encoder and its head: `View -> b dim`, not normalised."""

    def __init__(self, config: TowerConfig, dim: int):
        super().__init__()
        self.config = config
        self.encoder = config.encoder.build()
        self.head = head(cast(Encoder, self.encoder).dim, dim, config.head)
        if config.weights:
            adopt(self, config.weights)
        if config.freeze:
            freeze(self.encoder, config.train_blocks)
        if config.checkpoint_activations:
            switch = getattr(self.encoder, "checkpoint_activations", None)
            if switch is None:
                raise ValueError(
                    f"encoder kind {config.encoder.kind!r} has no checkpoint_activations(); set "
                    "checkpoint_activations=false for its tower"
                )
            switch()

    def forward(self, view: View) -> Tensor:
        return self.head(self.encoder(view))

    def train(self, mode: bool = True) -> Tower:
        """A wholly frozen encoder stays in evaluation mode, so that its statistics and dropout are frozen too."""
        super().train(mode)
        if self.config.freeze and not self.config.train_blocks:
            self.encoder.train(False)
        return self


def adopt(tower: Tower, path: str) -> None:
    """Start from the model.safetensors of an exported view. ValueError: not there, or of another tower."""
    weights = load_file(encoders.local_file(path, "towers.weights"))
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"towers.weights={path!r} is of another encoder or head: {reason}") from error


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


def freeze(encoder: nn.Module, train_blocks: int) -> None:
    """Stop an encoder's training but for its last blocks. ValueError: more blocks asked for than it has."""
    encoder.requires_grad_(False)
    if train_blocks:
        blocks = list(getattr(encoder, "blocks", None) or ())
        if len(blocks) < train_blocks:
            raise ValueError(
                f"train_blocks={train_blocks}, but {type(encoder).__name__} has {len(blocks)} known blocks"
            )
        for block in blocks[-train_blocks:]:
            block.requires_grad_(True)


class Task(nn.Module):
    """k views in, losses out: encode, gather once, objective.

    `views` maps a view to its tower; views that share a tower and a shape go through it in one call. Every tower runs
    on every row of every step, absent rows included (they hold filler), so that no rank ever skips a module: engines
    that reduce or gather by module cannot deadlock.
    """

    def __init__(
        self,
        views: Mapping[str, str],
        towers: Mapping[str, TowerConfig],
        dim: int,
        objective: Objective,
        exchange: Exchange,
    ):
        super().__init__()
        self.views = dict(views)
        self.towers = nn.ModuleDict({name: Tower(config, dim) for name, config in towers.items()})
        self.objective = objective
        self.exchange = exchange

    def encode(self, batch: Batch) -> Embeddings:
        """Unit rows per view, float32 (float64 stays)."""
        z = {v: unit(x) for v, x in self.through(batch, self.towers).items()}
        return Embeddings(z, batch.ids, batch.present, batch.labels)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The encoders' outputs before the heads: what probes and fine-tuning read."""
        return self.through(batch, {name: cast(Tower, tower).encoder for name, tower in self.towers.items()})

    def through(self, batch: Batch, modules: Mapping[str, nn.Module] | nn.ModuleDict) -> dict[str, Tensor]:
        """Each view through the module of its tower."""
        together: dict[tuple[str, Any], list[str]] = defaultdict(list)
        for v, tower in self.views.items():
            view = batch.views[v]
            together[tower, (view.data.shape, view.mask is None)].append(v)
        out = {}
        for (tower, _), names in together.items():
            result = modules[tower](joined([batch.views[v] for v in names]))
            out.update(zip(names, result.chunk(len(names))))
        return {v: out[v] for v in self.views}

    def forward(self, batch: Batch) -> Losses:
        local = self.encode(batch)
        with torch.autocast(batch.ids.device.type, enabled=False):
            mine, every = share(local, self.exchange)
            losses = self.objective(mine, every)
            return Losses(losses.total, {**losses.parts, **health(local)})


def joined(views: Sequence[View]) -> View:
    """Views of one shape as one view of more rows."""
    if len(views) == 1:
        return views[0]
    masks = [view.mask for view in views if view.mask is not None]
    return View(torch.cat([view.data for view in views]), torch.cat(masks) if masks else None)


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in float32 at least: bfloat16 has three digits, and similarities are divided by tau."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


@torch.no_grad()
def health(table: Embeddings) -> dict[str, Tensor]:
    """Uniformity and spread of each view's first rows on this rank: collapse shows here before it shows in the loss."""
    parts = {}
    for v, z in table.z.items():
        rows = z[:HEALTH_ROWS][table.present[v][:HEALTH_ROWS]]
        parts[f"uniformity/{v}"] = geometry.uniformity(rows)
        parts[f"spread/{v}"] = geometry.spread(rows)
    return parts

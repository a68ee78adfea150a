"""TempNet: contrastive learning at temperatures that a small network predicts from embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._moving_average import Gamma, MovingAverages, robust_loss
from mvpretrain.objectives._settings import MovingAverageConfig, agreed_dim
from mvpretrain.types import Embeddings, Losses


class TempNetConfig(MovingAverageConfig):
    """The robust contrastive loss of isogclr at temperatures predicted from the anchor: nothing is kept by sample.

    Temperatures are in [min, max]; the network of each view has so many `prototypes`, compared by a softmax whose own
    temperature starts at `sharpness`. `gamma` of 1 takes the batch's own negatives; below 1, the moving averages of
    sogclr are kept by id (the authors' code has 0.8). `dim` is the width of the embeddings, which a recipe fills in.
    """

    kind: Literal["tempnet"] = "tempnet"
    dim: int | None = Field(default=None, ge=1)
    min: float = Field(default=0.005, gt=0, allow_inf_nan=False)
    max: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    rho: float = Field(default=7.0, ge=0, allow_inf_nan=False)
    prototypes: int = Field(default=256, ge=1)
    sharpness: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    gamma: Gamma = Gamma(value=1.0)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            # As sharp as it starts by default, the softmax has a gradient of rounding errors in its sharpness.
            {"prototypes": 16, "sharpness": 1.0},
            {"prototypes": 16, "sharpness": 1.0, "in_view": True, "gradient": "features", "gamma": {"value": 0.8}},
        ]

    def differentiable(self) -> bool:
        return False  # the networks see rows through a stop-gradient

    @model_validator(mode="after")
    def _within(self) -> TempNetConfig:
        if not self.min < self.max:
            raise ValueError(f"needs min < max, got min={self.min} max={self.max}")
        return self

    def for_dim(self, dim: int) -> TempNetConfig:
        return self.model_copy(update={"dim": agreed_dim(self.dim, dim)})

    def build(self, views: Sequence[str], collectives: Collectives) -> TempNet:
        if self.dim is None:
            raise ValueError("objective.dim is missing: tempnet has a network on embeddings; set it to their width")
        return TempNet(self, self.dim, views, collectives)


class TempNet(nn.Module):
    """The robust global contrastive loss with predicted temperatures (Qiu et al. 2024, TempNet), mean over pairs:

        F = (1/|S|) sum_i [ tau(z_i) (log(eps + g_i) + rho) + tau'(z'_i) (log(eps + g'_i) + rho) ]

    with g as in sogclr. The network sees embeddings through a stop-gradient, and learns from the exact gradient of F in
    tau. Prototypes are unit vectors whose logits p a softmax compares and a sigmoid weighs:

        tau(z) = min + (max - min) sigmoid(v . [ (softmax(p / s) - 1/M) * sigmoid(p) ] + c),   p = sigmoid(W z) . P

    The networks are trained at the run's own rate. Cost as sogclr, and 2 b d (d + M) multiplications a direction.
    State: the networks, one a view; with gamma below 1, log u for each id and direction.
    """

    def __init__(self, config: TempNetConfig, dim: int, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config = config
        self.averages = MovingAverages(config.settings(views), collectives)
        self.views = list(dict.fromkeys(v for direction in self.averages.directions for v in direction))
        self.networks = nn.ModuleList(Predictor(config, dim) for _ in self.views)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        (old,) = self.averages.read(local, gathered)
        predicted = {v: network(local.z[v].detach()) for v, network in zip(self.views, self.networks, strict=True)}
        tau = [predicted[a] for a, _ in self.averages.directions]
        return self.averages.losses(
            local,
            gathered,
            old,
            tau,
            lambda anchors, t: robust_loss(anchors, t, self.config.rho),
            bounds=(self.config.min, self.config.max),
        )


class Predictor(nn.Module):
    """A temperature for each row."""

    def __init__(self, config: TempNetConfig, dim: int):
        super().__init__()
        self.config = config
        self.project = nn.Linear(dim, dim)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, dim))
        self.log_sharpness = nn.Parameter(torch.full((1,), math.log(config.sharpness)))
        self.read_out = nn.Linear(config.prototypes, 1)

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        c = self.config
        hidden = dropout(self.project(z).sigmoid(), c.dropout, self.training)
        logits = hidden @ normalize(self.prototypes, dim=1).T
        chosen = (logits / self.log_sharpness.exp()).softmax(dim=1) - 1 / c.prototypes
        return c.min + (c.max - c.min) * self.read_out(chosen * logits.sigmoid()).squeeze(1).sigmoid()

"""iSogCLR: contrastive learning against the whole data set, at a temperature of each sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._moving_average import BatchAverages, MovingAverages, robust_loss
from mvpretrain.objectives._settings import MovingAverageConfig
from mvpretrain.types import Embeddings, Losses


class ISogCLRConfig(MovingAverageConfig):
    """The robust global contrastive loss, whose temperatures are learned sample by sample.

    `rho` in nats: of N negatives, about N e^-rho decide. The gradient of a temperature is rho less the distance of the
    negatives' weights from equal ones, which is at most the logarithm of a batch's negatives: where rho is above that,
    every temperature ends at `min` (small batches want 0.4 to 2; 6 is for 1,024 rows). A temperature starts at `init`,
    stays in [min, max] and moves by `rate` times the moving average (`momentum` is a batch's weight in it) of its
    gradient, clipped at `clip`; both are kept by id. `published: true` counts the positive among the negatives of two
    different views.
    """

    kind: Literal["isogclr"] = "isogclr"
    init: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    min: float = Field(default=0.005, gt=0, allow_inf_nan=False)
    max: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    rho: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    rate: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, gt=0, le=1)
    clip: float = Field(default=5.0, gt=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"in_view": True, "gradient": "features"},
            {"published": True, "gamma": {"value": 0.3, "decay_steps": 4}},
        ]

    @model_validator(mode="after")
    def _within(self) -> ISogCLRConfig:
        if not self.min <= self.init <= self.max:
            raise ValueError(f"needs min <= init <= max, got min={self.min} init={self.init} max={self.max}")
        return self

    def build(self, views: Sequence[str], collectives: Collectives) -> ISogCLR:
        return ISogCLR(self, views, collectives)


class ISogCLR(nn.Module):
    """The robust global contrastive loss of Qiu et al. 2023 (iSogCLR), the mean over pairs, on the gathered batch:

        F = (1/|S|) sum_i [ tau_i (log(eps + g_i) + rho) + tau'_i (log(eps + g'_i) + rho) ],    tau >= min

    with g as in sogclr, at the anchor's temperature. This is the dual of choosing the worst weights of the negatives
    within a Kullback-Leibler distance rho of equal ones; tau_i is its multiplier, with the gradient

        log(eps + u_i) + rho - mean_j [ e^(h_ij / tau_i) / (eps + u_i) h_ij / tau_i ]

    of which each sample and direction has a moving average m: m <- (1 - momentum) m + momentum clip(gradient), then
    tau <- clip(tau - rate m, min, max). Temperatures are constants to the encoders' gradient. Rows of one id have one
    temperature, and the mean of their gradients.

    Cost as sogclr. State: log u, tau and m for each id and direction (for each pair with `in_view`).
    """

    def __init__(self, config: ISogCLRConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config = config
        self.averages = MovingAverages(config.settings(views), collectives, extra=2)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        log_u, tau, momentum = self.averages.read(local, gathered)
        tau, momentum = tau.nan_to_num(nan=self.config.init), momentum.nan_to_num(nan=0.0)
        return self.averages.losses(
            local,
            gathered,
            log_u,
            self.averages.local_by_direction(tau, local),
            lambda anchors, t: robust_loss(anchors, t, self.config.rho),
            lambda batch: self.moved(tau, momentum, batch),
            bounds=(self.config.min, self.config.max),
            positive_in_g=self.config.published and not self.config.in_view,
        )

    def moved(
        self, tau: Float[Tensor, "n s"], momentum: Float[Tensor, "n s"], batch: BatchAverages
    ) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s"]]:
        """(temperatures, momenta) after the batch; those of which it says nothing stay."""
        c = self.config
        gradient = (batch.slope + c.rho).clamp(-c.clip, c.clip)
        new = (1 - c.momentum) * momentum + c.momentum * gradient
        lower = (tau - c.rate * new).clamp(c.min, c.max)
        return torch.where(batch.seen, lower, tau), torch.where(batch.seen, new, momentum)

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """See `SampleTemperatures`."""
        return self.averages.mean_by_id(1)

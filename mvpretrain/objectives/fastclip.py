"""FastCLIP: global contrastive losses with a constant, a learnable or individual temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._moving_average import AnchorAverages, BatchAverages, Gamma, MovingAverages, robust_loss
from mvpretrain.objectives._settings import MovingAverageConfig, Temperature
from mvpretrain.types import Embeddings, Losses

VARIANTS: dict[str, dict[str, Any]] = {
    "v0": {"tau": "global", "scaled": False, "rho": 0.0, "temperature": {"init": 0.07}},
    "v1": {"tau": "constant", "scaled": True, "rho": 0.0, "temperature": {"init": 0.07}},
    "v2": {"tau": "individual", "scaled": True, "rho": 7.0, "temperature": {"init": 0.03}},
    "v3": {"tau": "global", "scaled": True, "rho": 6.5, "temperature": {"init": 0.07}},
}


class FastCLIPConfig(MovingAverageConfig):
    """The four losses of FastCLIP: `variant` v0 to v3 fills in what is not said of the other settings.

    | variant | `tau` | `scaled` | `rho` | `temperature` |
    |---|---|---|---|---|
    | v0 | global, learned with the model | false | 0 | {init: 0.07} |
    | v1 | constant | true | 0 | {init: 0.07} |
    | v2 | individual, by Adam for each sample | true | 7 | {init: 0.03} |
    | v3 | global, learned with the model | true | 6.5 | {init: 0.07} |

    As in isogclr, rho must be below the logarithm of a batch's negatives: small batches want less than the defaults.
    `scaled`: whether log terms are multiplied by the temperature. `rate`, `betas` and `clip` are those of Adam on
    individual temperatures. The published rho of v3 go with a gradient that is not that of its objective; `published:
    true` has it, and the encoders' gradient of v2 without its factor tau. `gamma` falls from 1 to its value by half a
    cosine where it has `decay_steps`.
    """

    kind: Literal["fastclip"] = "fastclip"
    variant: Literal["v0", "v1", "v2", "v3"] = "v3"
    tau: Literal["constant", "global", "individual"]
    scaled: bool
    rho: float = Field(ge=0, allow_inf_nan=False)
    temperature: Temperature
    rate: float = Field(default=0.0133, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    gamma: Gamma = Gamma(value=0.2)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {},
            {"variant": "v0"},
            {"variant": "v1", "gradient": "features"},
            {"variant": "v2", "in_view": True},
            {"variant": "v2", "published": True},
            {"published": True},
        ]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("variant", "v3") in VARIANTS:
            return VARIANTS[value.get("variant", "v3")] | value
        return value

    @model_validator(mode="after")
    def _fits(self) -> FastCLIPConfig:
        self.temperature.refuse_per_pair("fastclip has one temperature, or one for each sample (tau: individual)")
        if self.tau == "individual" and not self.scaled:
            raise ValueError("objective.scaled is false, but an individual temperature is the multiplier of its loss")
        return self

    def build(self, views: Sequence[str], collectives: Collectives) -> FastCLIP:
        return FastCLIP(self, views, collectives)


class FastCLIP(nn.Module):
    """The losses of Wei et al. 2024 (FastCLIP), the mean over pairs of k views, on the gathered batch:

        v0  (1/|S|) sum_i log(eps + g_i) + log(eps + g'_i)                       tau learnable, for all
        v1  tau times v0                                                         tau constant
        v2  (1/|S|) sum_i tau_i (log(eps + g_i) + rho) + tau'_i (log(eps + g'_i) + rho)
        v3  tau times v0, + 2 rho tau                                            tau learnable, for all

    with g and its moving averages as in sogclr. Individual temperatures take a step of Adam whenever their sample
    comes, with their gradient clipped (see isogclr), and are constants to the encoders; the bias correction counts a
    sample's own visits. A learnable one has the exact gradient of the stated objective.

    Cost as sogclr. State: log tau, shape [1], where it is learnable; by id and direction log u, and for v2 tau, both of
    Adam's averages and the number of visits.
    """

    def __init__(self, config: FastCLIPConfig, views: Sequence[str], collectives: Collectives):
        super().__init__()
        self.config, self.individual = config, config.tau == "individual"
        self.averages = MovingAverages(config.settings(views), collectives, extra=4 if self.individual else 0)
        if config.tau == "global":
            self.log_temperature = config.temperature.parameter()

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        log_u, *kept = self.averages.read(local, gathered)
        if self.individual:
            return self._at_individual(local, gathered, log_u, kept)
        tau = log_u.new_full((1,), self.config.temperature.init)
        parts = {}
        if self.config.tau == "global":
            tau = self.config.temperature.bounded(self.log_temperature)
            parts["temperature"] = tau[0].detach()
        by_direction = [tau.expand(len(local.ids))] * len(self.averages.directions)
        losses = self.averages.losses(local, gathered, log_u, by_direction, self.loss)
        return Losses(losses.total, losses.parts | parts)

    def _at_individual(
        self, local: Embeddings, gathered: Embeddings, log_u: Float[Tensor, "n s"], kept: list[Float[Tensor, "n s"]]
    ) -> Losses:
        """At the temperatures that are kept by id, with Adam's averages and the visits beside them."""
        bounds = self.config.temperature
        kept = [kept[0].nan_to_num(nan=bounds.init), *(x.nan_to_num(nan=0.0) for x in kept[1:])]
        return self.averages.losses(
            local,
            gathered,
            log_u,
            self.averages.local_by_direction(kept[0], local),
            self.loss,
            lambda batch: self.moved(kept, batch),
            bounds=(bounds.min, bounds.max),
        )

    def loss(self, anchors: AnchorAverages, tau: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The loss of each anchor of a direction."""
        rho = self.config.rho
        if not self.config.scaled:
            return robust_loss(anchors, tau, rho, scaled=False)
        exact = robust_loss(anchors, tau, rho)
        if not self.config.published or self.config.tau == "constant":
            return exact
        if self.individual:
            # The authors' code: the encoders' gradient without the factor tau.
            return exact.detach() + robust_loss(anchors, tau, 0.0, scaled=False) - anchors.log_u
        # The authors' code: half the encoders' gradient, half of log u + rho in that of tau, but all of its other part.
        half = robust_loss(anchors, tau, rho) / 2
        other = (tau - tau.detach()) * anchors.inner / 2
        return half - other + exact.detach() / 2

    def moved(self, kept: list[Float[Tensor, "n s"]], batch: BatchAverages) -> list[Float[Tensor, "n s"]]:
        """Temperatures, Adam's averages and visits after the batch; those of which it says nothing stay."""
        c, (tau, first, second, visits) = self.config, kept
        gradient = (batch.slope + c.rho).clamp(-c.clip, c.clip)
        new_first = c.betas[0] * first + (1 - c.betas[0]) * gradient
        new_second = c.betas[1] * second + (1 - c.betas[1]) * gradient.square()
        count = visits + 1
        step = (new_first / (1 - c.betas[0] ** count)) / ((new_second / (1 - c.betas[1] ** count)).sqrt() + 1e-8)
        lower = (tau - c.rate * step).clamp(c.temperature.min, c.temperature.max)
        moved = (lower, new_first, new_second, count)
        return [torch.where(batch.seen, new, old) for new, old in zip(moved, kept, strict=True)]

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """See `SampleTemperatures`."""
        if not self.individual:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return self.averages.mean_by_id(1)

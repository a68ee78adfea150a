"""An anchor's negatives in the whole data set: moving averages by sample id of what batches show of them.

What SogCLR (Yuan et al. 2022), iSogCLR (Qiu et al. 2023) and FastCLIP (Wei et al. 2024) have in common. For an anchor i
of view a against the other samples' rows of view c, at a temperature tau_i of its own,

    h_ij = s_ij - s_ii,    g_i = mean_(j != i) e^(h_ij / tau_i),    u_i <- (1 - gamma) u_i + gamma g_i

and the objective's log g over the whole data set has the gradient g_i / u_i grad log g_i of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.config import Config
from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import own_rows
from mvpretrain.similarity.autograd import add_log_sums
from mvpretrain.similarity.groups import Groups, log_mean_within, mean_within
from mvpretrain.similarity.per_anchor import Direction, Gradient, per_anchor
from mvpretrain.types import Embeddings, Losses


class Gamma(Config):
    """How much a batch counts in the moving average: `value`, reached from 1 by half a cosine over `decay_steps` steps.

    `every` holds it for so many steps at a time: those of an epoch, as FastCLIP has it.
    """

    value: float = Field(default=0.8, gt=0, le=1)
    decay_steps: int = Field(default=0, ge=0)
    every: int = Field(default=1, ge=1)

    def at(self, step: int) -> float:
        held = step // self.every * self.every
        if held >= self.decay_steps:
            return self.value
        return self.value + (1 - self.value) * (1 + math.cos(math.pi * held / self.decay_steps)) / 2


class Settings(NamedTuple):
    """How averages are taken."""

    pairs: Sequence[Direction]
    gamma: Gamma
    eps: float
    in_view: bool
    gradient: Gradient
    device: bool  # whether the averages are on the rows' device


class Anchors(NamedTuple):
    """One direction of a pair, the local rows. Only log_g has a gradient: in z, and in the temperature."""

    log_g: Float[Tensor, " b"]  # of the batch
    log_u: Float[Tensor, " b"]  # of eps and the moving average, this batch included
    weight: Float[Tensor, " b"]  # g / (eps + u): what the batch's gradient counts
    inner: Float[Tensor, " b"]  # weight times the mean of h / tau: -tau d log(eps + u) / d tau
    counts: Bool[Tensor, " b"]  # where there are a positive and a negative
    number: Float[Tensor, ""]  # how many do over all ranks, as seen from one of equal parts
    accuracy: Float[Tensor, ""]


class Measured(NamedTuple):
    """What a batch shows, and the averages after it."""

    anchors: list[Anchors]  # by direction
    log_u: Float[Tensor, "n s"]  # the new moving averages by slot, without eps; NaN where there is none
    seen: Bool[Tensor, "n s"]  # slots that this batch says something of
    slope: Float[Tensor, "n s"]  # log(eps + u) - inner, the mean over the anchors of a slot
    tau: Float[Tensor, "n w"]  # everyone's temperatures
    valid: Bool[Tensor, "n w"]  # whose anchors count


class MovingAverages(nn.Module):
    """The moving averages of all directions of some pairs, and other numbers that are kept beside them.

    A direction's averages have a slot of their own; with `in_view`, where negatives are the other samples of both
    views, the two directions of a pair share one (two augmentations of one image), as rows of equal ids do: the mean of
    their g counts. `extra` numbers are kept for each slot besides. Logarithms are kept and added, so that nothing
    overflows and no running maximum is needed; an id's first visit is told by its absence. State: a step count, and (1
    + extra) numbers an id and slot. Messages a step: the sum that reads the state, and four numbers an anchor.
    """

    steps: Tensor

    def __init__(self, settings: Settings, collectives: Collectives, extra: int = 0):
        super().__init__()
        self.settings, self.collectives, self.extra = settings, collectives, extra
        self.directions: list[Direction] = [direction for u, v in settings.pairs for direction in ((u, v), (v, u))]
        self.slot = [w // 2 if settings.in_view else w for w in range(len(self.directions))]
        self.slots = self.slot[-1] + 1
        # Where the batch alone counts, there is nothing to remember.
        self.keeps = extra > 0 or settings.gamma.value < 1
        self.store = sample_state.SampleState((1 + extra) * self.slots, collectives, settings.device)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def read(self, local: Embeddings, gathered: Embeddings) -> Float[Tensor, "f n s"]:
        """What is kept of everyone's ids: log u and the extra numbers, NaN where there is nothing yet."""
        like = next(iter(local.z.values())).detach()
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        if not self.keeps:
            return like.new_full((1, len(gathered.ids), self.slots), torch.nan)
        rows = self.store.read(gathered.ids, like)
        return rows.view(len(rows), 1 + self.extra, self.slots).permute(1, 0, 2)

    def write(self, gathered: Embeddings, fields: Sequence[Float[Tensor, "n s"]]) -> None:
        """Keep log u and the extra numbers of everyone's ids. Evaluation leaves no trace."""
        if not self.training:
            return
        self.steps += 1
        if not self.keeps:
            return
        rows = torch.stack(list(fields), dim=1).flatten(1)
        there = ~fields[0].isnan().all(dim=1)  # the others begin with a number, whether an id is an anchor or not
        self.store.write(gathered.ids[there], rows[there])

    def local_by_direction(self, kept: Float[Tensor, "n s"], local: Embeddings) -> list[Float[Tensor, " b"]]:
        """The local rows of what is kept by slot, for each direction."""
        return [kept[own_rows(local, self.collectives), slot] for slot in self.slot]

    def measure(
        self,
        local: Embeddings,
        gathered: Embeddings,
        old: Float[Tensor, "n s"],
        tau: Sequence[Float[Tensor, " b"]],
        adjust: Callable[[Tensor], Tensor] = lambda log_g: log_g,
        positive_in_g: bool = False,
    ) -> Measured:
        """Everything about a batch at these temperatures, by direction; `old` are the averages before it.

        `adjust` is applied to a slot's log g before it is averaged in, and `positive_in_g` adds the positive to the
        sum over negatives: published code does so.
        """
        shown = self._shown(local, gathered, tau, positive_in_g)
        told = [torch.stack([s.log_g, s.slope, s.counts.to(s.slope), t]) for s, t in zip(shown, tau, strict=True)]
        packed = torch.stack(told).detach().permute(2, 1, 0).contiguous()  # b 4 w
        every_log_g, every_slope, counts, every_tau = self.collectives.gather(packed).unbind(1)
        members = [[w for w, slot in enumerate(self.slot) if slot == s] for s in range(self.slots)]
        groups, valid = Groups.by(gathered.ids), counts > 0.5
        fresh = [adjust(log_mean_within(groups, every_log_g[:, m], valid[:, m])) for m in members]
        log_g = torch.stack(fresh, dim=1)
        seen, gamma = ~log_g.isnan(), self.settings.gamma.at(int(self.steps))
        kept = old + math.log1p(-gamma) if gamma < 1 else torch.full_like(old, -torch.inf)
        log_u = torch.where(old.isnan(), log_g, torch.logaddexp(kept, log_g + math.log(gamma)))
        log_u = torch.where(seen, log_u, old)
        below = self._below(log_u)
        inner = (every_log_g - below).exp() * every_slope
        slope = [mean_within(groups, (below - inner)[:, m], valid[:, m]) for m in members]
        at, here = own_rows(local, self.collectives), len(local.ids) / len(gathered.ids)
        anchors = []
        for w, s in enumerate(shown):
            weight = (s.log_g.detach() - below[at, w]).exp()
            alike = members[self.slot[w]]  # of one average, whose gradient is theirs together
            number = valid[:, alike].sum().clamp_min(1) * (here / len(alike))
            accuracy = (s.hit & s.counts).sum() / number
            anchors.append(Anchors(s.log_g, below[at, w], weight, inner[at, w], s.counts, number, accuracy))
        return Measured(anchors, log_u, seen, torch.stack(slope, dim=1), every_tau, valid)

    def _below(self, log_u: Float[Tensor, "n s"]) -> Float[Tensor, "n w"]:
        """log(eps + u) by direction; 0 where there is no average, which no anchor reads."""
        known, eps = log_u.nan_to_num(nan=0.0), self.settings.eps
        log_eps = torch.full_like(known, math.log(eps) if eps else -torch.inf)
        return torch.logaddexp(known, log_eps)[:, self.slot]

    def _shown(
        self, local: Embeddings, gathered: Embeddings, tau: Sequence[Tensor], positive_in_g: bool
    ) -> list[_Shown]:
        """By direction, what the local anchors find in this batch."""
        directions = [*self.directions, *((a, a) for a, _ in self.directions if self.settings.in_view)]
        scales = 1 / torch.stack([*tau, *(tau if self.settings.in_view else ())])
        found = per_anchor(local, gathered, directions, scales, self.collectives, True, self.settings.gradient)
        shown = []
        for w in range(len(self.directions)):
            across, others = found[w], found[w :: len(self.directions)]
            number = sum(f.candidates for f in others)
            counts = across.anchor & (number > 0)
            lse, positive = add_log_sums([f.lse for f in others]), across.positive * scales[w]
            share = torch.stack([f.lse for f in others]).sub(lse.detach()).exp()
            mean = (share * torch.stack([f.mean for f in others])).sum(dim=0)
            log_g = (lse - positive).masked_fill(~counts, 0)
            slope = (mean - positive.detach()).masked_fill(~counts, 0).detach()
            if positive_in_g:  # with h = 0, it adds 1 to the sum and nothing to the sum of h
                with_it = torch.logaddexp(log_g, torch.zeros_like(log_g))
                slope, log_g = slope * (log_g - with_it).exp().detach(), with_it.masked_fill(~counts, 0)
            log_g = log_g - torch.as_tensor(number).clamp_min(1).to(log_g).log()
            top = torch.stack([f.top for f in others]).amax(dim=0)
            shown.append(_Shown(log_g, slope, counts, across.positive > top))
        return shown

    def total(self, measured: Measured, losses: Sequence[Float[Tensor, " b"]]) -> Losses:
        """The mean over anchors of each direction, the sum of a pair's two directions, and the mean over pairs."""
        values = [
            loss.masked_fill(~a.counts, 0).sum() / a.number for loss, a in zip(losses, measured.anchors, strict=True)
        ]
        parts = {}
        for p, (u, v) in enumerate(self.settings.pairs):
            there, back = measured.anchors[2 * p], measured.anchors[2 * p + 1]
            parts[f"loss/{u}-{v}"] = (values[2 * p] + values[2 * p + 1]).detach()
            parts[f"accuracy/{u}-{v}"] = (there.accuracy + back.accuracy) / 2
        parts["gamma"] = values[0].new_tensor(self.settings.gamma.at(int(self.steps)))
        return Losses(torch.stack(values).sum() / len(self.settings.pairs), parts)

    def numbers(self, field: int) -> tuple[Tensor, Tensor]:
        """(this rank's ids, one kept field's mean over their slots)."""
        ids, rows = self.store.items()
        return ids, rows.view(len(ids), 1 + self.extra, self.slots)[:, field].nanmean(dim=1)


class _Shown(NamedTuple):
    log_g: Float[Tensor, " b"]
    slope: Float[Tensor, " b"]  # the mean of h / tau, weighted as in g
    counts: Bool[Tensor, " b"]
    hit: Bool[Tensor, " b"]


def robust(anchors: Anchors, tau: Float[Tensor, " b"], rho: float, scaled: bool = True) -> Float[Tensor, " b"]:
    """tau (log(eps + u) + rho) of each anchor, without tau in front where not `scaled`.

    The gradient in rows and temperature is that of the stated objective, where u is g of the whole data set.
    """
    outer = tau if scaled else torch.ones_like(tau)
    moved = anchors.log_g - anchors.log_g.detach()  # 0, with the gradient of log g
    return outer * (anchors.log_u + rho) + outer.detach() * anchors.weight * moved


@torch.no_grad()
def temperature_parts(
    tau: Float[Tensor, "n w"], valid: Bool[Tensor, "n w"], low: float, high: float
) -> dict[str, Tensor]:
    """The mean, the deciles and the share at a bound of the temperatures of all ranks' anchors."""
    each = tau[valid] if valid.any() else tau.flatten()
    bound = (each <= low * 1.001) | (each >= high * 0.999)
    deciles = each.quantile(each.new_tensor([0.1, 0.5, 0.9]))
    parts = {"temperature": each.mean(), "temperature/at_bounds": bound.to(each).mean()}
    return parts | {f"temperature/{q}": x for q, x in zip((10, 50, 90), deciles)}

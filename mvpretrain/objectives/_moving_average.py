"""An anchor's negatives in the whole data set: moving averages by sample id of what batches show of them.

What SogCLR (Yuan et al. 2022), iSogCLR (Qiu et al. 2023) and FastCLIP (Wei et al. 2024) have in common. For an anchor i
of view a against the other samples' rows of view c, at a temperature tau_i of its own,

    h_ij = s_ij - s_ii,    g_i = mean_(j != i) e^(h_ij / tau_i),    u_i <- (1 - gamma) u_i + gamma g_i

and the objective's log g over the whole data set has the gradient g_i / u_i grad log g_i of a batch.

Shapes: b local rows, n gathered rows, w directions, s slots (the averages that one id has).
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
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import BatchMean, own_rows
from mvpretrain.distributed.sample_state import SampleState
from mvpretrain.similarity.groups import Groups, group_log_mean, group_mean
from mvpretrain.similarity.log_sum_exp import add_log_sums
from mvpretrain.similarity.per_anchor import GradientMode, per_anchor
from mvpretrain.similarity.tables import directions_of
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


class AverageSettings(NamedTuple):
    """How averages are taken."""

    pairs: Sequence[tuple[str, str]]
    gamma: Gamma
    eps: float
    in_view: bool
    gradient: GradientMode
    device: bool  # whether the averages are on the rows' device


class AnchorAverages(NamedTuple):
    """The local anchors of one direction. Only log_g has a gradient: in z, and in the temperature."""

    log_g: Float[Tensor, " b"]  # of the batch
    log_u: Float[Tensor, " b"]  # of eps and the moving average, this batch included
    weight: Float[Tensor, " b"]  # g / (eps + u): what the batch's gradient counts
    inner: Float[Tensor, " b"]  # weight times the mean of h / tau: -tau d log(eps + u) / d tau
    valid: Bool[Tensor, " b"]  # where there are a positive and a negative
    mean: BatchMean  # over the anchors of every rank, of this direction or of all that share its average
    accuracy: Float[Tensor, ""]


class BatchAverages(NamedTuple):
    """What a batch shows, and the averages after it."""

    anchors: list[AnchorAverages]  # by direction
    log_u: Float[Tensor, "n s"]  # the new moving averages by slot, without eps; NaN where there is none
    seen: Bool[Tensor, "n s"]  # slots that this batch says something of
    slope: Float[Tensor, "n s"]  # log(eps + u) - inner, the mean over the anchors of a slot
    tau: Float[Tensor, "n w"]  # the temperatures of every rank's rows
    valid: Bool[Tensor, "n w"]  # which of these rows are anchors


AnchorLoss = Callable[[AnchorAverages, Float[Tensor, " b"]], Float[Tensor, " b"]]  # of anchors at their temperatures


class MovingAverages(nn.Module):
    """The moving averages of all directions of some pairs, and other numbers that are kept beside them.

    A direction's averages have a slot of their own; with `in_view`, where negatives are the other samples of both
    views, the two directions of a pair share one (two augmentations of one image), as rows of equal ids do: the mean of
    their g counts. `extra` numbers are kept for each slot besides. Logarithms are kept and added, so that nothing
    overflows and no running maximum is needed; an id's first visit is known by its absence.

    State: a step count, and 1 + `extra` numbers an id and slot. Messages a step: the sum that reads the state, and four
    numbers an anchor.
    """

    steps: Tensor

    def __init__(self, settings: AverageSettings, collectives: Collectives, extra: int = 0):
        super().__init__()
        self.settings, self.collectives, self.extra = settings, collectives, extra
        self.directions = directions_of(settings.pairs)
        self.slot = [w // 2 if settings.in_view else w for w in range(len(self.directions))]
        self.slots = self.slot[-1] + 1
        # With gamma 1 an average is the batch's own value: nothing is kept by id.
        self.keeps = extra > 0 or settings.gamma.value < 1
        self.store = SampleState((1 + extra) * self.slots, collectives, settings.device)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def read(self, local: Embeddings, gathered: Embeddings) -> Float[Tensor, "f n s"]:
        """What is kept of the gathered ids: log u and the extra numbers, NaN where there is nothing yet."""
        like = next(iter(local.z.values())).detach()
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        if not self.keeps:
            return like.new_full((1, len(gathered.ids), self.slots), torch.nan)
        rows = self.store.read(gathered.ids, like)
        return rows.view(len(rows), 1 + self.extra, self.slots).permute(1, 0, 2)

    def local_by_direction(self, kept: Float[Tensor, "n s"], local: Embeddings) -> list[Float[Tensor, " b"]]:
        """The local rows of what is kept by slot, for each direction."""
        return [kept[own_rows(local, self.collectives), slot] for slot in self.slot]

    def losses(
        self,
        local: Embeddings,
        gathered: Embeddings,
        old: Float[Tensor, "n s"],
        tau: Sequence[Float[Tensor, " b"]],
        loss: AnchorLoss,
        update: Callable[[BatchAverages], Sequence[Float[Tensor, "n s"]]] = lambda batch: (),
        bounds: tuple[float, float] | None = None,
        adjust: Callable[[Tensor], Tensor] = lambda log_g: log_g,
        positive_in_g: bool = False,
    ) -> Losses:
        """The mean of the anchors' losses at these temperatures (by direction), with the averages brought up to date.

        `old` is log u before the batch. `update(batch)` gives the extra numbers after it, and `bounds` of temperatures
        ask for their statistics among the parts. `adjust` and `positive_in_g` as in `batch_averages`.
        """
        batch = self.batch_averages(local, gathered, old, tau, adjust, positive_in_g)
        losses = self._mean_loss(batch, [loss(a, t) for a, t in zip(batch.anchors, tau, strict=True)])
        self.write(gathered, [batch.log_u, *update(batch)])
        parts = {} if bounds is None else temperature_parts(batch.tau, batch.valid, *bounds)
        return Losses(losses.total, losses.parts | parts)

    def write(self, gathered: Embeddings, fields: Sequence[Float[Tensor, "n s"]]) -> None:
        """Keep log u and the extra numbers of the gathered ids, and count the step; nothing in evaluation."""
        if not self.training:
            return
        self.steps += 1
        if not self.keeps:
            return
        rows = torch.stack(list(fields), dim=1).flatten(1)
        known = ~fields[0].isnan().all(dim=1)  # the others begin with a number, whether an id is an anchor or not
        self.store.write(gathered.ids[known], rows[known])

    def batch_averages(
        self,
        local: Embeddings,
        gathered: Embeddings,
        old: Float[Tensor, "n s"],
        tau: Sequence[Float[Tensor, " b"]],
        adjust: Callable[[Tensor], Tensor] = lambda log_g: log_g,
        positive_in_g: bool = False,
    ) -> BatchAverages:
        """What a batch shows at these temperatures, by direction; `old` are the averages (log u) before it.

        `adjust` is applied to a slot's log g before it is averaged in, and `positive_in_g` adds the positive to the
        sum over negatives: published code does so.
        """
        terms = self._anchor_terms(local, gathered, tau, positive_in_g)
        by_direction = [
            torch.stack([x.log_g, x.slope, x.valid.to(x.slope), t]) for x, t in zip(terms, tau, strict=True)
        ]
        packed = torch.stack(by_direction).detach().permute(2, 1, 0).contiguous()  # b 4 w
        all_log_g, all_slopes, all_valid, all_tau = self.collectives.gather(packed).unbind(1)
        members = [[w for w, slot in enumerate(self.slot) if slot == s] for s in range(self.slots)]
        groups, valid = Groups.by(gathered.ids), all_valid > 0.5
        log_g = torch.stack([adjust(group_log_mean(groups, all_log_g[:, m], valid[:, m])) for m in members], dim=1)
        seen, log_u = ~log_g.isnan(), self._moved(old, log_g)
        with_eps = self._with_eps(log_u)
        inner = (all_log_g - with_eps).exp() * all_slopes
        slope = [group_mean(groups, (with_eps - inner)[:, m], valid[:, m]) for m in members]
        own, anchors = own_rows(local, self.collectives), []
        for w, x in enumerate(terms):
            weight = (x.log_g.detach() - with_eps[own, w]).exp()
            sharing = members[self.slot[w]]  # the directions of one average, whose gradient is theirs together
            mean = BatchMean.over(valid[:, sharing].sum(), local, gathered, len(sharing))
            accuracy = mean(x.hit & x.valid)
            anchors.append(AnchorAverages(x.log_g, with_eps[own, w], weight, inner[own, w], x.valid, mean, accuracy))
        return BatchAverages(anchors, log_u, seen, torch.stack(slope, dim=1), all_tau, valid)

    def _moved(self, old: Float[Tensor, "n s"], log_g: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
        """log u after a batch: g itself at a first visit, and as it was where the batch says nothing."""
        gamma = self.settings.gamma.at(int(self.steps))
        kept = old + math.log1p(-gamma) if gamma < 1 else torch.full_like(old, -torch.inf)
        log_u = torch.where(old.isnan(), log_g, torch.logaddexp(kept, log_g + math.log(gamma)))
        return torch.where(log_g.isnan(), old, log_u)

    def _with_eps(self, log_u: Float[Tensor, "n s"]) -> Float[Tensor, "n w"]:
        """log(eps + u) by direction; 0 where there is no average, which no anchor reads."""
        known, eps = log_u.nan_to_num(nan=0.0), self.settings.eps
        log_eps = torch.full_like(known, math.log(eps) if eps else -torch.inf)
        return torch.logaddexp(known, log_eps)[:, self.slot]

    def _anchor_terms(
        self, local: Embeddings, gathered: Embeddings, tau: Sequence[Tensor], positive_in_g: bool
    ) -> list[_AnchorTerms]:
        """By direction, what the local anchors find in this batch."""
        in_view = self.settings.in_view
        directions = [*self.directions, *((a, a) for a, _ in self.directions if in_view)]
        scales = 1 / torch.stack([*tau, *(tau if in_view else ())])
        found = per_anchor(local, gathered, directions, scales, self.collectives, True, self.settings.gradient)
        terms = []
        for w in range(len(self.directions)):
            cross_view, negatives = found[w], found[w :: len(self.directions)]
            number = sum(f.candidates for f in negatives)
            valid = cross_view.is_anchor & (number > 0)
            lse, positive = add_log_sums([f.lse for f in negatives]), cross_view.positive * scales[w]
            weight = torch.stack([f.lse for f in negatives]).sub(lse.detach()).exp()
            mean = (weight * torch.stack([f.mean for f in negatives])).sum(dim=0)
            log_g = (lse - positive).masked_fill(~valid, 0)
            slope = (mean - positive.detach()).masked_fill(~valid, 0).detach()
            if positive_in_g:  # with h = 0, it adds 1 to the sum and nothing to the sum of h
                with_it = torch.logaddexp(log_g, torch.zeros_like(log_g))
                slope, log_g = slope * (log_g - with_it).exp().detach(), with_it.masked_fill(~valid, 0)
            log_g = log_g - torch.as_tensor(number).clamp_min(1).to(log_g).log()
            top = torch.stack([f.top for f in negatives]).amax(dim=0)
            terms.append(_AnchorTerms(log_g, slope, valid, cross_view.positive > top))
        return terms

    def _mean_loss(self, batch: BatchAverages, losses: Sequence[Float[Tensor, " b"]]) -> Losses:
        """The mean over anchors of each direction, the sum of a pair's two directions, and the mean over pairs."""
        values = [a.mean(loss, a.valid) for loss, a in zip(losses, batch.anchors, strict=True)]
        parts = {}
        for p, (u, v) in enumerate(self.settings.pairs):
            one, other = batch.anchors[2 * p], batch.anchors[2 * p + 1]
            parts[f"loss/{u}-{v}"] = (values[2 * p] + values[2 * p + 1]).detach()
            parts[f"accuracy/{u}-{v}"] = (one.accuracy + other.accuracy) / 2
        parts["gamma"] = values[0].new_tensor(self.settings.gamma.at(int(self.steps)))
        return Losses(torch.stack(values).sum() / len(self.settings.pairs), parts)

    def mean_by_id(self, field: int) -> tuple[Tensor, Tensor]:
        """(this rank's ids, one kept number's mean over their slots); `field` 0 is log u."""
        ids, rows = self.store.items()
        return ids, rows.view(len(ids), 1 + self.extra, self.slots)[:, field].nanmean(dim=1)


class _AnchorTerms(NamedTuple):
    log_g: Float[Tensor, " b"]
    slope: Float[Tensor, " b"]  # the mean of h / tau, weighted as in g
    valid: Bool[Tensor, " b"]
    hit: Bool[Tensor, " b"]  # the positive is more similar than every negative


def robust_loss(
    anchors: AnchorAverages, tau: Float[Tensor, " b"], rho: float, scaled: bool = True
) -> Float[Tensor, " b"]:
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
    """The mean, the deciles and the part at a bound of the temperatures of all ranks' anchors."""
    each = tau[valid] if valid.any() else tau.flatten()
    bound = (each <= low * 1.001) | (each >= high * 0.999)
    deciles = each.quantile(each.new_tensor([0.1, 0.5, 0.9]))
    parts = {"temperature": each.mean(), "temperature/at_bounds": bound.to(each).mean()}
    return parts | {f"temperature/{q}": x for q, x in zip((10, 50, 90), deciles)}

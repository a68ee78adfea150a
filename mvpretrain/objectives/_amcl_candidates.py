"""What an anchor of amcl is compared with: rows by head with their codes, all of them softly or the hardest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mvpretrain.objectives._temperature_network import Scored, TemperatureNetwork, omega
from mvpretrain.similarity import autograd, per_pair
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.groups import count_by_key, sum_by_key
from mvpretrain.similarity.log_sum_exp import add_log_sums
from mvpretrain.similarity.per_pair import PairTemperature
from mvpretrain.similarity.top_k import top_k


class HeadRows(NamedTuple):
    """The rows of one view of a table by head, each of length one, with their codes; zeros where a row is absent."""

    h: Float[Tensor, "n h d"]
    code: Float[Tensor, "n h w"]
    present: Bool[Tensor, " n"]
    ids: Int[Tensor, " n"]

    @classmethod
    def cat(cls, parts: list[HeadRows]) -> HeadRows:
        return parts[0] if len(parts) == 1 else cls(*(torch.cat(x) for x in zip(*parts)))


class SoftSum(NamedTuple):
    """By anchor and head, log sum_j e^(-cost_j) over its candidates, -inf without any, and the j of the largest."""

    lse: Float[Tensor, "b h"]
    argmax: Int[Tensor, "b h"]


class Negatives(NamedTuple):
    scored: Scored  # b h m
    valid: Bool[Tensor, "b h m"]  # False where there are fewer than m
    column: Int[Tensor, "b h m"]
    mean: Float[Tensor, " b"]  # the largest mean over heads


def positive_of(anchors: HeadRows, candidates: HeadRows, network: TemperatureNetwork) -> Scored:
    """Each anchor against the mean of the candidates of its id; both products are linear in rows and codes."""
    same_id = torch.isin(candidates.ids, anchors.ids)
    ids, present = candidates.ids[same_id], candidates.present[same_id]
    both = torch.cat([candidates.h[same_id], candidates.code[same_id]], dim=2) * present[:, None, None]
    count = count_by_key(ids, present, anchors.ids).clamp_min(1)
    mean = sum_by_key(ids, both.flatten(1), anchors.ids) / count[:, None]
    row, code = mean.unflatten(1, both.shape[1:]).split([anchors.h.shape[2], anchors.code.shape[2]], dim=2)
    return Scored((anchors.h * row).sum(dim=2), network.between(anchors.code, code))


def soft_sum(anchors: HeadRows, candidates: HeadRows, law: PairTemperature, exclude_same_id: bool) -> SoftSum:
    """Over all present candidates, or those of another id. Exact, tile by tile: see `per_pair.logsumexp`."""
    ids = (anchors.ids, candidates.ids) if exclude_same_id else None
    mask = PairMask(anchors.present, candidates.present, *(ids or ()))
    found = []
    for row, column, *codes in zip(*(x.unbind(1) for x in (anchors.h, candidates.h, anchors.code, candidates.code))):
        if law.low == law.up:  # one temperature, whose cost all candidates and the positive have in common
            scale = row.new_full((1,), 1 / law.low)
            found.append(autograd.logsumexp(row, column, scale, candidates.present, ids))
        else:
            found.append(per_pair.logsumexp(row, column, *codes, temperature=law, mask=mask))
    return SoftSum(*(torch.stack(x, dim=1) for x in zip(*found)))


def hardest(anchors: HeadRows, candidates: HeadRows, network: TemperatureNetwork, kappa: int) -> Negatives:
    """The kappa candidates of another id that are most similar to each anchor in each head, the hardest first."""
    mask = PairMask(anchors.present, candidates.present, anchors.ids, candidates.ids)
    found = top_k(anchors.h, candidates.h, kappa, mask)
    scored = scored_at(anchors, candidates, network, found.column)
    return Negatives(scored, found.similarity > -torch.inf, found.column, found.mean)


def scored_at(
    anchors: HeadRows, candidates: HeadRows, network: TemperatureNetwork, column: Int[Tensor, "b h m"]
) -> Scored:
    """Each anchor against the candidates with these indices."""
    head = torch.arange(anchors.h.shape[1], device=column.device)[:, None]
    similarity = (anchors.h[:, :, None] * candidates.h[column, head]).sum(dim=3)
    return Scored(similarity, network.between(anchors.code[:, :, None], candidates.code[column, head]))


def soft_losses(
    anchors: HeadRows,
    candidates: HeadRows,
    own_view: HeadRows | None,
    positive: Scored,
    network: TemperatureNetwork,
    beta: float,
    positive_counts: bool,
) -> tuple[Float[Tensor, "b h"], Float[Tensor, " b"]]:
    """cost+ + log-sum-exp by head, and the part of heads whose largest term is the anchor's own.

    The sum is over the candidates, those of the anchor's own id only if `positive_counts`, and over the other samples
    of `own_view` where it is given.
    """
    dim = anchors.h.shape[2]
    beta = beta if network.low < network.up else 0.0  # else all costs have the same in them
    law = PairTemperature(network.low, network.up, beta * dim / 2, beta)
    sums = [soft_sum(anchors, candidates, law, exclude_same_id=not positive_counts)]
    argmax = sums[0].argmax
    if own_view is not None:
        sums.append(soft_sum(anchors, own_view, law, exclude_same_id=True))
    lse = add_log_sums([x.lse.flatten() for x in sums]).view_as(argmax)
    cost = positive.cost(beta, dim)
    with torch.no_grad():
        largest = scored_at(anchors, candidates, network, argmax[..., None]).cost(beta, dim)[..., 0]
        own = candidates.ids[argmax] == anchors.ids[:, None]
        hit = (own | (cost < largest)).to(cost.dtype).mean(dim=1)
    return cost + lse, hit


def top_losses(
    positive: Scored, negative: Negatives, beta: float, dim: int, positive_counts: bool
) -> Float[Tensor, "b h"]:
    """The positive's cost less the mean of the hardest candidates', by head.

    The positive is among the candidates if `positive_counts`.
    """
    own, costs, valid = positive.cost(beta, dim), negative.scored.cost(beta, dim), negative.valid
    if positive_counts:
        similarity = negative.scored.similarity.masked_fill(~valid, -torch.inf)
        similarity = torch.cat([similarity, positive.similarity[..., None]], dim=2).detach()
        chosen = similarity.topk(valid.shape[2], dim=2).indices
        costs = torch.cat([costs, own[..., None]], dim=2).gather(2, chosen)
        valid = torch.cat([valid, torch.ones_like(valid[..., :1])], dim=2).gather(2, chosen)
    return own - costs.masked_fill(~valid, 0).sum(dim=2) / valid.sum(dim=2).clamp_min(1)


def published_losses(positive: Scored, negative: Negatives, beta: float, dim: int) -> Float[Tensor, "b h"]:
    """The authors': the mean of the hardest negatives, and the sum of what their temperatures cost, without dim / 2."""
    (similarity, tau), valid = negative[:2]
    mean = (similarity / tau).masked_fill(~valid, 0).sum(dim=2) / valid.sum(dim=2).clamp_min(1)
    return positive.cost(beta, dim) + mean - beta * omega(tau, 2).masked_fill(~valid, 0).sum(dim=2)


def has_negative(
    ids: Int[Tensor, " b"], candidates_ids: Int[Tensor, " n"], present: Bool[Tensor, " n"]
) -> Bool[Tensor, " b"]:
    """True for an id beside which another one is present among the candidates."""
    return present.sum() > count_by_key(candidates_ids, present, ids)

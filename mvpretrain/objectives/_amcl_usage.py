"""What amcl reports of temperatures and heads: by anchor, so that means over ranks are those of the batch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mvpretrain.objectives._amcl_candidates import HeadRows, Negatives
from mvpretrain.objectives._temperature_network import Scored, TemperatureNetwork

QUARTERS = 4
NEAR = 0.01  # part of the range of temperatures: one as near to a bound counts as at it
SAMPLE = 128  # of the gathered rows: those that temperatures are reported of where every row is a candidate


@torch.no_grad()
def usage(
    anchors: HeadRows,
    candidates: HeadRows | None,
    positive: Scored,
    negative: Negatives | None,
    network: TemperatureNetwork,
    weight: Float[Tensor, " b"],
) -> dict[str, Float[Tensor, ""]]:
    """How temperatures and heads are used: means over anchors, each row's weight in them given.

    `candidates` are those of a loss with negatives, `negative` the hardest where only these count.
    """
    heads = range(anchors.h.shape[1])
    by_name = {"positive": (positive.temperature[..., None], torch.ones_like(positive.similarity[..., None]))}
    found = {"heads/spread": weight @ positive.similarity.std(dim=1, correction=0)}
    if candidates is not None:
        if negative is None:
            scored, valid = sampled(anchors, candidates, network)
        else:
            scored, valid = negative.scored, negative.valid
            clearest = (positive.similarity - scored.similarity[:, :, 0]).argmax(dim=1)
            found |= {f"heads/usage/{c}": weight @ (clearest == c).to(weight.dtype) for c in heads}
            found["heads/shared_negatives"] = weight @ agreement(negative.column[:, :, 0]).to(weight.dtype)
        by_name["negative"] = (scored.temperature, valid.to(weight.dtype))
        found["temperature/correlation"] = weight @ correlation_by_row(*scored, valid).mean(dim=1)
    for name, (temperature, counted) in by_name.items():
        mean = weight @ ((temperature * counted).sum(dim=2) / counted.sum(dim=2).clamp_min(1))
        found |= {f"temperature/{name}/head{c}": mean[c] for c in heads}
        for share, part in histogram(temperature, counted, network.low, network.up).items():
            found[f"temperature/{name}/{share}"] = weight @ part
    return found


def sampled(anchors: HeadRows, candidates: HeadRows, network: TemperatureNetwork) -> tuple[Scored, Tensor]:
    """The anchors against the first rows of a table, and which of these are negatives: `b h m` both."""
    h, code, present, ids = (x[:SAMPLE].transpose(0, 1) if x.ndim == 3 else x[:SAMPLE] for x in candidates)
    similarity = anchors.h.transpose(0, 1) @ h.transpose(1, 2)
    temperature = network.across(anchors.code.transpose(0, 1), code)
    valid = present & (anchors.ids[:, None] != ids)
    scored = Scored(similarity.transpose(0, 1), temperature.transpose(0, 1))
    return scored, valid[:, None].expand_as(scored.similarity)


def histogram(
    temperature: Float[Tensor, "b h k"], weight: Float[Tensor, "b h k"], low: float, up: float
) -> dict[str, Float[Tensor, " b"]]:
    """By name, the part of each row's temperatures in each quarter of [low, up], and of those at either bound."""
    position = (temperature - low) / (up - low) if up > low else torch.zeros_like(temperature)
    quarter = (position * QUARTERS).long().clamp(0, QUARTERS - 1)
    inside = {f"quarter{q + 1}": quarter == q for q in range(QUARTERS)}
    inside |= {"at_low": position < NEAR, "at_high": position > 1 - NEAR}
    count = weight.sum(dim=(1, 2)).clamp_min(1)
    return {name: (where * weight).sum(dim=(1, 2)) / count for name, where in inside.items()}


def correlation_by_row(
    x: Float[Tensor, "b h k"], y: Float[Tensor, "b h k"], valid: Bool[Tensor, "b h k"]
) -> Float[Tensor, "b h"]:
    """Each row's correlation of the valid x with the valid y; 0 where either does not vary."""
    count = valid.sum(dim=2, keepdim=True).clamp_min(1)
    x, y = (((v - v.masked_fill(~valid, 0).sum(dim=2, keepdim=True) / count).masked_fill(~valid, 0)) for v in (x, y))
    scale = x.norm(dim=2) * y.norm(dim=2)
    return (x * y).sum(dim=2) / scale.clamp_min(torch.finfo(x.dtype).eps)


def agreement(chosen: Int[Tensor, "b h"]) -> Float[Tensor, " b"]:
    """For each row, the part of the pairs of heads that have chosen the same; 0 for one head."""
    heads = chosen.shape[1]
    same = (chosen[:, :, None] == chosen[:, None]).sum(dim=(1, 2)).double() - heads
    return same / max(heads * (heads - 1), 1)

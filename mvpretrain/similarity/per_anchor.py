"""What anchors find among candidates, each at a temperature of its own: one direction of a pair of views at a time.

Where all anchors have one temperature, `all_pairs` has both directions of a pair from one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.similarity import blockwise
from mvpretrain.similarity.autograd import without_autocast
from mvpretrain.similarity.groups import count_by_key
from mvpretrain.similarity.log_sum_exp import without_empty
from mvpretrain.similarity.tables import Direction, Tables
from mvpretrain.types import Embeddings

GradientMode = Literal["features", "scalars"]  # what is sent so that candidates get their gradient


class PerAnchorSums(NamedTuple):
    """What the local anchors of one view find among the candidates of another, over the rows of every rank."""

    lse: Float[Tensor, " b"]  # log sum_j e^(scale_i s_ij); -inf where there is no candidate
    mean: Float[Tensor, " b"]  # the candidates' scale_i s_ij on the average, weighted as in that sum; no gradient
    argmax: Int[Tensor, " b"]  # the row of the most similar candidate
    top: Float[Tensor, " b"]  # its similarity, not scaled; no gradient
    positive: Float[Tensor, " b"]  # mean similarity, not scaled, to the candidates of the anchor's id; 0 without any
    candidates: Int[Tensor, " b"]  # how many there are in the sum
    is_anchor: Bool[Tensor, " b"]  # whether the row is present and has a positive


def per_anchor(
    local: Embeddings,
    gathered: Embeddings,
    directions: Sequence[Direction],
    scales: Float[Tensor, "w b"],
    collectives: Collectives,
    exclude_same_id: bool,
    gradient: GradientMode = "scalars",
) -> list[PerAnchorSums]:
    """For each direction (v, v included), sums over candidates of e^(scale_i s_ij), with a scale for each anchor.

    `exclude_same_id` leaves candidates of the anchor's own id out. Differentiable once, in z and scales. `gradient`
    says how candidates get theirs: `features` sends each row's back through the gather, O(n d) numbers; `scalars` (Wei
    et al. 2024, FastCLIP, section 4) sends four numbers an anchor and direction, and each rank computes what all
    anchors ask of its own candidates. Both give the same, and cost 5 b n d multiplications a direction. Memory: O(n d)
    a view, O(b d) a direction.
    """
    tables = Tables.of(local, gathered, collectives, exclude_same_id)
    columns = [z.detach() if gradient == "scalars" else z for z in gathered.z.values()]
    outputs = _PerAnchor.apply(tables, list(directions), gradient, scales, *local.z.values(), *columns)
    lse, mean, argmax, top, positive = outputs  # type: ignore[misc]
    found = []
    for w, (a, c) in enumerate(directions):
        same_id, present = count_by_key(gathered.ids, gathered.present[c], local.ids), gathered.present[c].sum()
        candidates = present - same_id if exclude_same_id else present.expand(len(same_id))
        is_anchor = local.present[a] & (same_id > 0)
        found.append(PerAnchorSums(lse[w], mean[w], argmax[w], top[w], positive[w], candidates, is_anchor))
    return found


class _PerAnchor(torch.autograd.Function):
    """Results have the dimensions (direction, row)."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, tables: Tables, directions: Sequence[Direction], gradient, scales, *tensors: Tensor):
        local, gathered = tables.split(tensors)
        one, cache = scales.new_ones(1), blockwise.TileCache()
        lse, mean, top, positive = (torch.zeros_like(scales) for _ in range(4))
        argmax = torch.zeros_like(scales, dtype=torch.int64)
        means, positive_weight = [], torch.ones_like(scales)
        for w, (a, c) in enumerate(directions):
            rows, mask = local[a] * scales[w, :, None], tables.pair_mask(tables.local, a, tables.gathered, c)
            sums, _ = blockwise.forward(rows, gathered[c], one, mask, both=False, cache=(cache, w))
            lse[w], argmax[w] = sums
            # The candidates' mean, weighted as in the sum, has the mean similarity and the anchor's gradient in it.
            by_row = (sums.lse, torch.ones_like(sums.lse))
            average, _ = blockwise.backward(rows, gathered[c], one, mask, by_row, None, (cache, w), (True, False))
            means.append(average)
            mean[w] = (rows * average).sum(dim=1)
            top[w] = (local[a] * gathered[c][sums.argmax]).sum(dim=1).masked_fill(sums.lse == -torch.inf, -torch.inf)
            same_id = count_by_key(tables.gathered.ids, tables.gathered.present[c], tables.local.ids)
            positive_weight[w] /= same_id.clamp_min(1)
            positive[w] = (local[a] * _positive_sums(tables, gathered, c)).sum(dim=1) * positive_weight[w]
        ctx.tables, ctx.directions, ctx.gradient = tables, directions, gradient
        ctx.save_for_backward(scales, lse, positive_weight, *means, *tensors)
        ctx.mark_non_differentiable(mean, argmax, top)
        return lse, mean, argmax, top, positive

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_lse, _mean, _argmax, _top, grad_positive):  # type: ignore[override]
        tables, directions = ctx.tables, ctx.directions
        scales, lse, positive_weight, *rest = ctx.saved_tensors
        means, tensors = rest[: len(directions)], rest[len(directions) :]
        local, gathered = tables.split(tensors)
        lse, grad_lse = without_empty(lse, grad_lse)
        grad_scales = torch.zeros_like(scales)
        grad_local, grad_gathered = ({v: torch.zeros_like(z) for v, z in table.items()} for table in (local, gathered))
        terms = torch.stack([scales, lse, grad_lse, grad_positive * positive_weight])  # 4 w b
        for w, (a, c) in enumerate(directions):
            # Where there is no candidate, the mean is 0.
            grad_scales[w] = grad_lse[w] * (local[a] * means[w]).sum(dim=1)
            grad_local[a].addcmul_(means[w], (grad_lse[w] * scales[w])[:, None])
            grad_local[a].addcmul_(_positive_sums(tables, gathered, c), terms[3, w, :, None])
        if ctx.gradient == "features":
            for w, (a, c) in enumerate(directions):
                anchors = _Rows(tables.local, a, local[a], tables.own)
                candidates = _Rows(tables.gathered, c, gathered[c], tables.whole)
                grad_gathered[c] += _candidate_gradient(tables, terms[:, w], anchors, candidates)
            return None, None, None, grad_scales, *grad_local.values(), *grad_gathered.values()
        terms = tables.collectives.gather(terms.permute(2, 0, 1).contiguous()).permute(1, 2, 0)
        for w, (a, c) in enumerate(directions):
            anchors = _Rows(tables.gathered, a, gathered[a], tables.whole)
            candidates = _Rows(tables.local, c, local[c], tables.own)
            grad_local[c] += _candidate_gradient(tables, terms[:, w], anchors, candidates)
        return None, None, None, grad_scales, *grad_local.values(), *(None for _ in grad_gathered)


def _positive_sums(tables: Tables, gathered: dict[str, Tensor], c: str) -> Float[Tensor, "b d"]:
    """For each local row the sum of the present rows of view c that carry its id."""
    return tables.groups.sum(gathered[c] * tables.gathered.present[c][:, None], tables.whole, tables.own)


class _Rows(NamedTuple):
    """The rows of one view of a table."""

    table: Embeddings
    view: str
    z: Tensor
    at: slice  # where they are in the gathered table


def _candidate_gradient(tables: Tables, terms: Tensor, anchors: _Rows, candidates: _Rows) -> Tensor:
    """The gradient of what these anchors found, in their sums and as their positives, in the rows of candidates.

    `terms` are the anchors' scale, log-sum-exp, gradient of it, and gradient of the positives' sum.
    """
    scale, lse, grad_lse, grad_positive = terms
    mask = tables.pair_mask(anchors.table, anchors.view, candidates.table, candidates.view)
    rows, one = anchors.z * scale[:, None], scale.new_ones(1)
    _, grad = blockwise.backward(rows, candidates.z, one, mask, (lse, grad_lse), None, wanted=(False, True))
    weight = (grad_positive * anchors.table.present[anchors.view])[:, None]
    of_positives = tables.groups.sum(anchors.z * weight, anchors.at, candidates.at)
    return grad.addcmul_(of_positives, candidates.table.present[candidates.view][:, None].to(grad.dtype))

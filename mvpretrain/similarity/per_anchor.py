"""What anchors find among candidates, each at a temperature of its own: one direction of a pair of views at a time.

Where all anchors have one temperature, `similarity.all_pairs` has both directions of a pair from one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import own_rows, refuse_other_ranks
from mvpretrain.similarity import blockwise
from mvpretrain.similarity.autograd import without_autocast
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.groups import Groups, count_by_key
from mvpretrain.types import Embeddings

Direction = tuple[str, str]  # anchors' view, candidates' view
Gradient = Literal["features", "scalars"]


class PerAnchorSums(NamedTuple):
    """What the local anchors of one view find among the candidates of another, over the rows of every rank."""

    lse: Float[Tensor, " b"]  # log sum_j e^(scale_i s_ij); -inf where there is no candidate
    mean: Float[Tensor, " b"]  # the candidates' scale_i s_ij on the average, weighted as in that sum; no gradient
    argmax: Int[Tensor, " b"]  # the row of the most similar candidate
    top: Float[Tensor, " b"]  # its similarity, not scaled; no gradient
    positive: Float[Tensor, " b"]  # mean similarity, not scaled, to the candidates of the anchor's id; 0 without any
    candidates: Int[Tensor, " b"]  # how many there are in the sum
    anchor: Bool[Tensor, " b"]  # whether the row is there and has a positive


class _Job(NamedTuple):
    collectives: Collectives
    directions: Sequence[Direction]
    local: Embeddings
    gathered: Embeddings
    exclude_same_id: bool
    gradient: Gradient
    groups: Groups

    @property
    def own(self) -> slice:
        return own_rows(self.local, self.collectives)

    @property
    def whole(self) -> slice:
        return slice(0, len(self.gathered.ids))

    def pair_mask(self, rows: Embeddings, a: str, columns: Embeddings, c: str) -> PairMask:
        ids = (rows.ids, columns.ids) if self.exclude_same_id else ()
        return PairMask(rows.present[a], columns.present[c], *ids)

    def tables(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = list(self.local.z)
        return dict(zip(names, tensors)), dict(zip(names, tensors[len(names) :]))

    def positives(self, gathered: dict[str, Tensor], c: str) -> Float[Tensor, "b d"]:
        """For each local row the sum of the present rows of view c that carry its id."""
        return self.groups.sum(gathered[c] * self.gathered.present[c][:, None], self.whole, self.own)


def per_anchor(
    local: Embeddings,
    gathered: Embeddings,
    directions: Sequence[Direction],
    scales: Float[Tensor, "w b"],
    collectives: Collectives,
    exclude_same_id: bool,
    gradient: Gradient = "scalars",
) -> list[PerAnchorSums]:
    """For each direction (v, v included), sums over candidates of e^(scale_i s_ij), with a scale for each anchor.

    `exclude_same_id` leaves candidates of the anchor's own id out. Differentiable once, in z and scales. `gradient`
    says how candidates get theirs: `features` sends each row's back through the gather, O(n d) numbers; `scalars` (Wei
    et al. 2024, FastCLIP, section 4) sends four numbers an anchor and direction, and each rank computes what all
    anchors ask of its own candidates. Both are equal, and cost 5 b n d multiplications a direction. Memory: O(n d) a
    view, O(b d) a direction.
    """
    refuse_other_ranks(local, gathered, collectives)
    job = _Job(collectives, directions, local, gathered, exclude_same_id, gradient, Groups.by(gathered.ids))
    columns = [z.detach() if gradient == "scalars" else z for z in gathered.z.values()]
    lse, mean, argmax, top, positive = _Directed.apply(job, scales, *local.z.values(), *columns)  # type: ignore[misc]
    found = []
    for w, (a, c) in enumerate(directions):
        same = count_by_key(gathered.ids, gathered.present[c], local.ids)
        candidates = (
            gathered.present[c].sum() - same if exclude_same_id else gathered.present[c].sum().expand(len(same))
        )
        anchor = local.present[a] & (same > 0)
        found.append(PerAnchorSums(lse[w], mean[w], argmax[w], top[w], positive[w], candidates, anchor))
    return found


class _Directed(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, job: _Job, scales, *tensors: Tensor):
        local, gathered = job.tables(tensors)
        one, cache = scales.new_ones(1), blockwise.TileCache()
        lse, mean, top, positive = (torch.zeros_like(scales) for _ in range(4))
        argmax = torch.zeros_like(scales, dtype=torch.int64)
        means, share = [], torch.ones_like(scales)
        for w, (a, c) in enumerate(job.directions):
            rows, mask = local[a] * scales[w, :, None], job.pair_mask(job.local, a, job.gathered, c)
            sums, _ = blockwise.forward(rows, gathered[c], one, mask, both=False, cache=(cache, w))
            lse[w], argmax[w] = sums
            # The candidates' mean, weighted as in the sum, has the mean similarity and the anchor's gradient in it.
            by_row = (sums.lse, torch.ones_like(sums.lse))
            average, _ = blockwise.backward(rows, gathered[c], one, mask, by_row, None, (cache, w), sides=(True, False))
            means.append(average)
            mean[w] = (rows * average).sum(dim=1)
            top[w] = (local[a] * gathered[c][sums.argmax]).sum(dim=1).masked_fill(sums.lse == -torch.inf, -torch.inf)
            share[w] /= count_by_key(job.gathered.ids, job.gathered.present[c], job.local.ids).clamp_min(1)
            positive[w] = (local[a] * job.positives(gathered, c)).sum(dim=1) * share[w]
        ctx.job = job
        ctx.save_for_backward(scales, lse, share, *means, *tensors)
        ctx.mark_non_differentiable(mean, argmax, top)
        return lse, mean, argmax, top, positive

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, to_lse, _mean, _best, _top, to_positive):  # type: ignore[override]
        job: _Job = ctx.job
        scales, lse, share, *rest = ctx.saved_tensors
        means, tensors = rest[: len(job.directions)], rest[len(job.directions) :]
        local, gathered = job.tables(tensors)
        lse, to_lse = blockwise.without_empty(lse, to_lse)
        to_scales = torch.zeros_like(scales)
        to_local, to_every = ({v: torch.zeros_like(z) for v, z in table.items()} for table in (local, gathered))
        asked = torch.stack([scales, lse, to_lse, to_positive * share])  # 4 w b
        for w, (a, c) in enumerate(job.directions):
            # Where there is no candidate, the mean is 0.
            to_scales[w] = to_lse[w] * (local[a] * means[w]).sum(dim=1)
            to_local[a].addcmul_(means[w], (to_lse[w] * scales[w])[:, None])
            to_local[a].addcmul_(job.positives(gathered, c), asked[3, w, :, None])
        if job.gradient == "features":
            for w, (a, c) in enumerate(job.directions):
                anchors, candidates = (job.local, local[a], job.own), (job.gathered, gathered[c], job.whole)
                to_every[c] += _asked_of(job, w, asked, anchors, candidates)
            return None, to_scales, *to_local.values(), *to_every.values()
        asked = job.collectives.gather(asked.permute(2, 0, 1).contiguous()).permute(1, 2, 0)
        for w, (a, c) in enumerate(job.directions):
            anchors, candidates = (job.gathered, gathered[a], job.whole), (job.local, local[c], job.own)
            to_local[c] += _asked_of(job, w, asked, anchors, candidates)
        return None, to_scales, *to_local.values(), *(None for _ in to_every)


Rows = tuple[Embeddings, Tensor, slice]  # a table, its rows of one view, and which rows of everyone's they are


def _asked_of(job: _Job, w: int, asked: Tensor, anchors: Rows, candidates: Rows) -> Tensor:
    """The gradient in rows of candidates of what these anchors found in them, in the sums and as their positives."""
    (a, c), (scale, lse, to_lse, to_positive) = job.directions[w], asked[:, w]
    (rows, z, of), (columns, others, at) = anchors, candidates
    mask, one = job.pair_mask(rows, a, columns, c), scale.new_ones(1)
    _, found = blockwise.backward(z * scale[:, None], others, one, mask, (lse, to_lse), None, sides=(False, True))
    weight = (to_positive * rows.present[a])[:, None]
    return found.addcmul_(job.groups.sum(z * weight, of, at), columns.present[c][:, None].to(found.dtype))

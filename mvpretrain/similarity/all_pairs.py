"""Similarities of this rank's rows with everyone's, pair of views by pair of views: sums over them, never the numbers.

Both directions of a pair come from one product: a rank's rows against all columns give its rows' sums whole and the
columns' sums in part, and the parts are merged over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import own_rows, refuse_other_ranks
from mvpretrain.similarity import blockwise
from mvpretrain.similarity.autograd import without_autocast
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.groups import Groups, count_by_key, sum_by_key
from mvpretrain.types import Embeddings

Pairs = Sequence[tuple[str, str]]


class AnchorSums(NamedTuple):
    """What the local anchors of one view find among the candidates of another one, over the rows of every rank."""

    lse: Float[Tensor, " b"]  # log sum of e^(scale similarity); -inf where there is no candidate
    argmax: Int[Tensor, " b"]  # the row of the most similar candidate
    positive: Float[Tensor, " b"]  # mean similarity, not scaled, to the candidates of the anchor's id; 0 without any
    anchor: Bool[Tensor, " b"]  # whether the row is there and has such a candidate
    anchors: Int[Tensor, ""]  # how many rows of every rank are and have


def all_pairs(
    local: Embeddings,
    gathered: Embeddings,
    pairs: Pairs,
    scales: Float[Tensor, " p"],
    collectives: Collectives,
    exclude_same_id: bool = False,
) -> dict[tuple[str, str], AnchorSums]:
    """The sums of (u, v) and of (v, u) for each pair of views, present rows only.

    `exclude_same_id` leaves candidates of the anchor's own id out; then u may be v. Where `gathered` comes without z,
    the tables are passed round a ring of ranks, the next one on its way while one is worked on. Differentiable once, in
    z and scales. Cost for b of n rows and a pair: b n d multiplications forward, 3 b n d backward. Memory: O(n d) for
    each view when gathered, O(b d) in the ring, and O(n) for each pair. Messages: three of n numbers a pair forward,
    one backward.
    """
    refuse_other_ranks(local, gathered, collectives)
    job = _Job(collectives, list(pairs), local, gathered, exclude_same_id, Groups.by(gathered.ids))
    counts = {
        v: job.groups.sum(p[:, None].float(), job.whole, job.whole).squeeze(1) for v, p in gathered.present.items()
    }
    tables = [*local.z.values(), *gathered.z.values()]
    lse, argmax, positive = _AllPairs.apply(job, scales, counts, *tables)  # type: ignore[misc]
    found = {}
    for p, (u, v) in enumerate(pairs):
        for d, a, c in ((1, v, u), (0, u, v)):
            anchors = gathered.present[a] & (counts[c] > 0)
            found[a, c] = AnchorSums(lse[d, p], argmax[d, p], positive[d, p], anchors[job.own], anchors.sum())
    return found


class _Job(NamedTuple):
    """What the passes need beside tensors with a gradient."""

    collectives: Collectives
    pairs: list[tuple[str, str]]
    local: Embeddings
    gathered: Embeddings
    exclude_same_id: bool
    groups: Groups  # by id

    @property
    def whole(self) -> slice:
        return slice(0, len(self.gathered.ids))

    @property
    def crosses(self) -> bool:
        """Whether any pair has columns of its own to sum; a view with itself has its rows' sums already."""
        return any(u != v for u, v in self.pairs)

    @property
    def own(self) -> slice:
        return own_rows(self.local, self.collectives)

    def tables(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = list(self.local.z)
        return dict(zip(names, tensors)), dict(zip(names, tensors[len(names) :]))

    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """(rows of the whole table, those rows by view): all at once, or rank by rank beginning with this one."""
        local, gathered = self.tables(tensors)
        if gathered:
            yield self.whole, gathered
            return
        b = len(self.local.ids)
        for rank, block in _ring(self.collectives, torch.stack(list(local.values()))):
            yield slice(rank * b, (rank + 1) * b), dict(zip(local, block))

    def pair_mask(self, u: str, v: str, at: slice) -> PairMask:
        ids = (self.local.ids, self.gathered.ids[at]) if self.exclude_same_id else ()
        return PairMask(self.local.present[u], self.gathered.present[v][at], *ids)

    def directions(self, at: slice) -> Iterator[tuple[int, int, str, str, Tensor]]:
        """(direction, pair, anchors' view, candidates' view, the presence of a block's candidates)."""
        if not self.exclude_same_id:
            for p, (u, v) in enumerate(self.pairs):
                yield 0, p, u, v, self.gathered.present[v][at]
                yield 1, p, v, u, self.gathered.present[u][at]


def _ring(collectives: Collectives, own: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(rank, its tensor) for every rank, this one first; the next is on its way while the caller works."""
    rank, size, block = collectives.rank, collectives.size, own
    for shift in range(size):
        ahead, behind = (rank + shift + 1) % size, (rank - shift - 1) % size
        coming = collectives.send_recv(own, to=behind, source=ahead) if shift + 1 < size else None
        yield (rank + shift) % size, block
        block = coming() if coming else block


class _AllPairs(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, job: _Job, scales, counts, *tensors: Tensor):
        local, _ = job.tables(tensors)
        b, n, like = len(job.local.ids), len(job.gathered.ids), tensors[0]
        row, column = _PairLogSumExps.empty(len(job.pairs), b, like), _PairLogSumExps.empty(len(job.pairs), n, like)
        positive, cache = like.new_zeros(2, len(job.pairs), b), blockwise.TileCache()
        for at, block in job.blocks(tensors):
            for p, (u, v) in enumerate(job.pairs):
                scale = scales[p : p + 1]
                mask, name = job.pair_mask(u, v, at), (cache, (p, at.start))
                by_row, by_column = blockwise.forward(local[u], block[v], scale, mask, both=u != v, cache=name)
                row.merge(p, slice(0, b), by_row, _top(local[u], block[v], scale, by_row), at.start)
                if by_column:
                    column.merge(p, at, by_column, _top(block[v], local[u], scale, by_column), job.own.start)
            for d, p, a, c, present in job.directions(at):
                positive[d, p] += (local[a] * job.groups.sum(block[c] * present[:, None], at, job.own)).sum(dim=1)
        if job.crosses:
            column.merge_over_ranks(job.collectives)
        share = torch.ones_like(positive)
        for d, p, _, c, _ in job.directions(job.whole):
            share[d, p] /= counts[c][job.own].clamp_min(1)
        ctx.job, ctx.cache = job, cache
        ctx.save_for_backward(scales, row.lse, column.lse, share, *tensors)
        lse = torch.stack([row.lse, column.lse[:, job.own]])
        argmax = torch.stack([row.argmax, column.argmax[:, job.own]])
        ctx.mark_non_differentiable(argmax)
        return lse, argmax, positive * share

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _, to_positive):  # type: ignore[override]
        job: _Job = ctx.job
        scales, row_lse, column_lse, share, *tensors = ctx.saved_tensors
        local, gathered = job.tables(tensors)
        column_grad = job.collectives.gather(grad[1].T.contiguous()).T if job.crosses else None
        to_scales, to_local = torch.zeros_like(scales), {v: torch.zeros_like(z) for v, z in local.items()}
        to_positive = to_positive * share
        home = _BlockGradients(job, to_local)
        for at, block in job.blocks(tensors):
            to_block = {v: torch.zeros_like(z) for v, z in block.items()}
            for p, (u, v) in enumerate(job.pairs):
                scale, by_row = scales[p : p + 1], (row_lse[p], grad[0, p])
                by_column = (column_lse[p, at], column_grad[p, at]) if column_grad is not None and u != v else None
                mask, name = job.pair_mask(u, v, at), (ctx.cache, (p, at.start))
                found = blockwise.backward(local[u], block[v], scale, mask, by_row, by_column, name)
                # sum_ij G_ij <row_i, column_j> without another tile: it is <rows, G columns>.
                to_scales[p] += (found[0] * local[u]).sum()
                to_local[u].addcmul_(found[0], scale)
                to_block[v].addcmul_(found[1], scale)
            for d, p, a, c, present in job.directions(at):
                weight = to_positive[d, p, :, None]
                to_local[a].addcmul_(job.groups.sum(block[c] * present[:, None], at, job.own), weight)
                back = job.groups.sum(local[a] * (weight * job.local.present[a][:, None]), job.own, at)
                to_block[c].addcmul_(back, present[:, None].to(back.dtype))
            home.send(at, to_block)
        return None, to_scales, None, *to_local.values(), *(home.gathered.values() if gathered else ())


class _BlockGradients:
    """Where the gradients of a block's rows go: back to the gather, or through the ring to the rank that owns them."""

    def __init__(self, job: _Job, to_local: dict[str, Tensor]):
        self.job, self.to_local = job, to_local
        self.gathered: dict[str, Tensor] = {}
        self.coming: Callable[[], Tensor] | None = None

    def send(self, at: slice, to_block: dict[str, Tensor]) -> None:
        if self.job.gathered.z:
            self.gathered = to_block
            return
        collectives, b = self.job.collectives, len(self.job.local.ids)
        self._receive()
        shift = (at.start // max(b, 1) - collectives.rank) % collectives.size
        to, source = (collectives.rank + shift) % collectives.size, (collectives.rank - shift) % collectives.size
        packed = torch.stack(list(to_block.values()))
        self.coming = collectives.send_recv(packed, to, source) if shift else lambda: packed
        if shift + 1 == collectives.size:
            self._receive()

    def _receive(self) -> None:
        if self.coming:
            for z, more in zip(self.to_local.values(), self.coming()):
                z += more
            self.coming = None


class _PairLogSumExps(NamedTuple):
    """Running sums of each pair: log-sum-exp, the largest term, and where it is."""

    lse: Tensor
    top: Tensor
    argmax: Tensor

    @classmethod
    def empty(cls, pairs: int, length: int, like: Tensor) -> _PairLogSumExps:
        nothing = like.new_full((pairs, length), -torch.inf)
        return cls(nothing, nothing.clone(), torch.zeros_like(nothing, dtype=torch.int64))

    def merge(self, p: int, at: slice, sums: blockwise.LogSumExp, top: Tensor, start: int) -> None:
        """Add one block's sums; its `best` counts from the row `start` of the whole table."""
        new = top > self.top[p, at]
        self.argmax[p, at] = torch.where(new, sums.argmax + start, self.argmax[p, at])
        self.top[p, at] = torch.where(new, top, self.top[p, at])
        self.lse[p, at] = torch.logaddexp(self.lse[p, at], sums.lse)

    def merge_over_ranks(self, collectives: Collectives) -> None:
        if collectives.size == 1:
            return
        lse, top = collectives.maximum(torch.stack([self.lse, self.top]))
        safe = blockwise.finite(lse)
        self.argmax.copy_(collectives.maximum(self.argmax.masked_fill((self.top < top) | (top == -torch.inf), 0)))
        self.lse.copy_(collectives.sum((self.lse - safe).exp()).log() + safe)


def _top(rows: Tensor, columns: Tensor, scale: Tensor, sums: blockwise.LogSumExp) -> Tensor:
    """The largest term of each row's sum."""
    top = (rows * columns[sums.argmax]).sum(dim=1) * scale if len(columns) else torch.zeros_like(sums.lse)
    return top.masked_fill(sums.lse == -torch.inf, -torch.inf)


@runtime_checkable
class AnchorWeighting(Protocol):
    """What an objective over pairs lets others do to the losses of its anchors before it takes their mean."""

    def __call__(self, direction: tuple[str, str], losses: Float[Tensor, " b"], counts: Bool[Tensor, " b"]) -> Tensor:
        """The losses of one direction's local rows, weighted; only those that count are used."""
        ...


def in_direction(
    weighting: AnchorWeighting | None, direction: tuple[str, str]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    return None if weighting is None else partial(weighting, direction)


class DirectionLoss(NamedTuple):
    """One direction of a pair: the mean loss, and the share of anchors whose best candidate is a positive."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def direction_loss(
    local: Embeddings,
    gathered: Embeddings,
    sums: AnchorSums,
    scale: Float[Tensor, ""],
    others: Float[Tensor, " b"] | None = None,
    weighting: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> DirectionLoss:
    """Anchors of the pair's first view against candidates of the second, and `others` in the denominator too.

    `weighting(losses, anchors that count)` gives the losses that the mean is of.
    """
    log_sum = sums.lse if others is None else torch.logaddexp(sums.lse, others)
    # The global number of anchors, as seen from one of len(gathered) / len(local) equal parts.
    rows = sums.anchors.clamp_min(1).to(log_sum.dtype) * (len(local.ids) / len(gathered.ids))
    losses = (log_sum - scale * sums.positive).masked_fill(~sums.anchor, 0)
    losses = losses if weighting is None else weighting(losses, sums.anchor)
    loss = losses.masked_fill(~sums.anchor, 0).sum() / rows
    hits = ((gathered.ids[sums.argmax] == local.ids) & sums.anchor).sum() / rows
    return DirectionLoss(loss, hits.detach())


def positive_mean(local: Embeddings, gathered: Embeddings, v: str) -> Float[Tensor, "b d"]:
    """For each local row, the mean of view v over the present rows of every rank that carry its id (0 where none)."""
    held = gathered.z[v] * gathered.present[v].to(gathered.z[v].dtype)[:, None]
    count = count_by_key(gathered.ids, gathered.present[v], local.ids)
    return sum_by_key(gathered.ids, held, local.ids) / count.clamp_min(1)[:, None]


def has_positive(table: Embeddings, gathered: Embeddings, u: str, v: str) -> Bool[Tensor, " b"]:
    """True for rows of `table` that have view u and, somewhere, a row of the same id that has view v."""
    return table.present[u] & torch.isin(table.ids, gathered.ids[gathered.present[v]])

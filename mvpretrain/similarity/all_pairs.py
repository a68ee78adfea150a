"""Similarities of this rank's rows with the gathered ones, pair of views by pair of views: sums, never the numbers.

Both directions of a pair come from one product: a rank's rows against all columns give its rows' sums whole and the
columns' sums in part, and the parts are merged over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.similarity import blockwise
from mvpretrain.similarity.autograd import without_autocast
from mvpretrain.similarity.log_sum_exp import LogSumExp, OnlineLogSumExp, finite
from mvpretrain.similarity.tables import AnchorSums, Direction, Tables
from mvpretrain.types import Embeddings

Pairs = Sequence[tuple[str, str]]


def all_pairs(
    local: Embeddings,
    gathered: Embeddings,
    pairs: Pairs,
    scales: Float[Tensor, " p"],
    collectives: Collectives,
    exclude_same_id: bool = False,
) -> dict[Direction, AnchorSums]:
    """The sums of (u, v) and of (v, u) for each pair of views, present rows only.

    `exclude_same_id` leaves candidates of the anchor's own id out; then u may be v, and `positive` is 0. Where
    `gathered` comes without z, the tables are passed round a ring of ranks, the next one on its way while one is worked
    on. Differentiable once, in z and scales. Cost for b of n rows and a pair: b n d multiplications forward, 3 b n d
    backward. Memory: O(n d) for each view when gathered, O(b d) in the ring, and O(n) for each pair. Messages: three of
    n numbers a pair forward, one backward.
    """
    tables = Tables.of(local, gathered, collectives, exclude_same_id)
    whole = tables.whole
    same_id_counts = {
        v: tables.groups.sum(p[:, None].float(), whole, whole).squeeze(1) for v, p in gathered.present.items()
    }
    tensors = [*local.z.values(), *gathered.z.values()]
    lse, argmax, positive = _AllPairs.apply(tables, list(pairs), scales, same_id_counts, *tensors)  # type: ignore[misc]
    sums = {}
    for p, (u, v) in enumerate(pairs):
        for d, a, c in ((1, v, u), (0, u, v)):
            anchors = gathered.present[a] & (same_id_counts[c] > 0)
            sums[a, c] = AnchorSums(lse[d, p], argmax[d, p], positive[d, p], anchors[tables.own], anchors.sum())
    return sums


class _AllPairs(torch.autograd.Function):
    """Results have the dimensions (direction, pair, row): direction 0 is (u, v), 1 is (v, u)."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, tables: Tables, pairs: Pairs, scales, same_id_counts, *tensors: Tensor):
        local, _ = tables.split(tensors)
        b, n, like = len(tables.local.ids), len(tables.gathered.ids), tensors[0]
        by_row, by_column = (OnlineLogSumExp.empty(like, len(pairs), length) for length in (b, n))
        positive, cache = like.new_zeros(2, len(pairs), b), blockwise.TileCache()
        for at, block in _blocks(tables, tensors):
            for p, (u, v) in enumerate(pairs):
                scale, mask = scales[p : p + 1], tables.pair_mask(tables.local, u, tables.gathered, v, at)
                named = cache, (p, at.start)
                row, column = blockwise.forward(local[u], block[v], scale, mask, both=u != v, cache=named)
                _merge(by_row.select(p), slice(0, b), row, _top(local[u], block[v], scale, row), at.start)
                if column:
                    top = _top(block[v], local[u], scale, column)
                    _merge(by_column.select(p), at, column, top, tables.own.start)
            for d, p, a, c, present in _positive_directions(tables, pairs, at):
                positive[d, p] += (local[a] * tables.groups.sum(block[c] * present[:, None], at, tables.own)).sum(dim=1)
        if _crosses(pairs):
            _merge_over_ranks(by_column, tables.collectives)
        positive_weight = torch.ones_like(positive)
        for d, p, _, c, _ in _positive_directions(tables, pairs, tables.whole):
            positive_weight[d, p] /= same_id_counts[c][tables.own].clamp_min(1)
        ctx.tables, ctx.pairs, ctx.cache = tables, pairs, cache
        ctx.save_for_backward(scales, by_row.lse, by_column.lse, positive_weight, *tensors)
        lse = torch.stack([by_row.lse, by_column.lse[:, tables.own]])
        argmax = torch.stack([by_row.argmax, by_column.argmax[:, tables.own]])
        ctx.mark_non_differentiable(argmax)
        return lse, argmax, positive * positive_weight

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_lse, _, grad_positive):  # type: ignore[override]
        tables, pairs = ctx.tables, ctx.pairs
        scales, row_lse, column_lse, positive_weight, *tensors = ctx.saved_tensors
        local, gathered = tables.split(tensors)
        column_grad = tables.collectives.gather(grad_lse[1].T.contiguous()).T if _crosses(pairs) else None
        grad_scales, grad_local = torch.zeros_like(scales), {v: torch.zeros_like(z) for v, z in local.items()}
        grad_positive = grad_positive * positive_weight
        returned = _BlockGradients(tables, grad_local)
        for at, block in _blocks(tables, tensors):
            grad_block = {v: torch.zeros_like(z) for v, z in block.items()}
            for p, (u, v) in enumerate(pairs):
                scale, mask = scales[p : p + 1], tables.pair_mask(tables.local, u, tables.gathered, v, at)
                by_row, named = (row_lse[p], grad_lse[0, p]), (ctx.cache, (p, at.start))
                by_column = (column_lse[p, at], column_grad[p, at]) if column_grad is not None and u != v else None
                grads = blockwise.backward(local[u], block[v], scale, mask, by_row, by_column, named)
                # sum_ij G_ij <row_i, column_j> without another tile: it is <rows, G columns>.
                grad_scales[p] += (grads[0] * local[u]).sum()
                grad_local[u].addcmul_(grads[0], scale)
                grad_block[v].addcmul_(grads[1], scale)
            for d, p, a, c, present in _positive_directions(tables, pairs, at):
                weight = grad_positive[d, p, :, None]
                grad_local[a].addcmul_(tables.groups.sum(block[c] * present[:, None], at, tables.own), weight)
                weighted = local[a] * (weight * tables.local.present[a][:, None])
                grad = tables.groups.sum(weighted, tables.own, at)
                grad_block[c].addcmul_(grad, present[:, None].to(grad.dtype))
            returned.send(at, grad_block)
        return None, None, grad_scales, None, *grad_local.values(), *(returned.gathered.values() if gathered else ())


def _crosses(pairs: Pairs) -> bool:
    """Whether any pair has columns of its own to sum; a view with itself has its rows' sums already."""
    return any(u != v for u, v in pairs)


def _positive_directions(tables: Tables, pairs: Pairs, at: slice) -> Iterator[tuple[int, int, str, str, Tensor]]:
    """(direction, pair, anchors' view, candidates' view, the presence of a block's candidates); none where candidates
    of the anchor's own id, and so its positives, are left out.
    """
    if not tables.exclude_same_id:
        for p, (u, v) in enumerate(pairs):
            yield 0, p, u, v, tables.gathered.present[v][at]
            yield 1, p, v, u, tables.gathered.present[u][at]


def _blocks(tables: Tables, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """(rows of the gathered table, those rows by view): all at once, or rank by rank beginning with this one."""
    local, gathered = tables.split(tensors)
    if gathered:
        yield tables.whole, gathered
        return
    b = len(tables.local.ids)
    for rank, block in _ring(tables.collectives, torch.stack(list(local.values()))):
        yield slice(rank * b, (rank + 1) * b), dict(zip(local, block))


def _ring(collectives: Collectives, own: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(rank, its tensor) for every rank, this one first; the next is on its way while the caller works."""
    rank, size, block = collectives.rank, collectives.size, own
    for shift in range(size):
        to, source = (rank - shift - 1) % size, (rank + shift + 1) % size
        coming = collectives.send_recv(own, to, source) if shift + 1 < size else None
        yield (rank + shift) % size, block
        block = coming() if coming else block


class _BlockGradients:
    """Where the gradients of a block's rows go: back to the gather, or through the ring to the rank that owns them."""

    def __init__(self, tables: Tables, grad_local: dict[str, Tensor]):
        self.tables, self.grad_local = tables, grad_local
        self.gathered: dict[str, Tensor] = {}
        self.coming: Callable[[], Tensor] | None = None

    def send(self, at: slice, grad_block: dict[str, Tensor]) -> None:
        if self.tables.gathered.z:
            self.gathered = grad_block
            return
        collectives, b = self.tables.collectives, len(self.tables.local.ids)
        self._receive()
        shift = (at.start // max(b, 1) - collectives.rank) % collectives.size
        to, source = (collectives.rank + shift) % collectives.size, (collectives.rank - shift) % collectives.size
        packed = torch.stack(list(grad_block.values()))
        self.coming = collectives.send_recv(packed, to, source) if shift else lambda: packed
        if shift + 1 == collectives.size:
            self._receive()

    def _receive(self) -> None:
        if self.coming:
            for z, more in zip(self.grad_local.values(), self.coming()):
                z += more
            self.coming = None


def _merge(running: OnlineLogSumExp, at: slice, block: LogSumExp, top: Tensor, start: int) -> None:
    """Take one block's sums into those of the rows `at`; its argmax counts from the row `start` of the whole table."""
    running.update_argmax(at, start, top, lambda rows: block.argmax[rows])
    running.add(at, block.lse)


def _merge_over_ranks(sums: OnlineLogSumExp, collectives: Collectives) -> None:
    if collectives.size == 1:
        return
    lse, top = collectives.maximum(torch.stack([sums.lse, sums.top]))
    safe = finite(lse)
    sums.argmax.copy_(collectives.maximum(sums.argmax.masked_fill((sums.top < top) | (top == -torch.inf), 0)))
    sums.lse.copy_(collectives.sum((sums.lse - safe).exp()).log() + safe)


def _top(rows: Tensor, columns: Tensor, scale: Tensor, sums: LogSumExp) -> Tensor:
    """The largest term of each row's sum; -inf of nothing."""
    top = (rows * columns[sums.argmax]).sum(dim=1) * scale if len(columns) else torch.zeros_like(sums.lse)
    return top.masked_fill(sums.lse == -torch.inf, -torch.inf)

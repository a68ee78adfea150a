"""Whole tuples: the rows that have every view, and the softmax that tells a row's own tuple from those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.similarity import autograd
from mvpretrain.similarity.groups import count_by_key
from mvpretrain.types import Embeddings

Tensors = tuple[Tensor, ...]
Score = Callable[[Tensors, Tensors, Tensors], Tensor]
TILE = 512  # rows and columns of one tile of `sum_apart`


class Tuples(NamedTuple):
    """The m rows of a table that have every view asked for."""

    z: tuple[Float[Tensor, "m d"], ...]  # by view
    ids: Int[Tensor, " m"]


class Sides(NamedTuple):
    """What a score needs to know of m tuples, first dimension m: of the anchor, and of the other views."""

    anchor: Tensors
    rest: Tensors
    ids: Int[Tensor, " m"]


class TupleLosses(NamedTuple):
    """What the softmax gives each local row."""

    loss: Float[Tensor, " b"]
    own: Float[Tensor, " b"]  # the score of the row's own tuple
    on_top: Float[Tensor, " b"]  # 1 where no tuple of another id scores as high; no gradient


def whole(table: Embeddings, views: Sequence[str]) -> Tuples:
    """The rows that have all of these views, in float32 at least."""
    has_all = torch.stack([table.present[v] for v in views]).all(dim=0)
    kind = torch.promote_types(table.z[views[0]].dtype, torch.float32)
    return Tuples(tuple(table.z[v][has_all].to(kind) for v in views), table.ids[has_all])


def rows_a_part(local: Embeddings, gathered: Embeddings, tuples: Tuples) -> float:
    """What a sum over the local rows is divided by, so that its average over the parts is the mean over all tuples."""
    return max(len(tuples.ids), 1) * len(local.ids) / len(gathered.ids)


def both_ways(score: Score, local: Sides, gathered: Sides, shared: Tensors, smoothing: float = 0.0) -> TupleLosses:
    """The mean of two softmaxes: each local anchor among everyone's rests, and each local rest among the anchors.

    `score(anchors, rests, shared)` gives a tile, as in `tiles.logsumexp_of_score`, and a batch of tiles for tensors
    with a leading batch dimension.
    """

    def turned(rests: Tensors, anchors: Tensors, shared: Tensors) -> Tensor:
        return score(anchors, rests, shared).mT

    ids = local.ids, gathered.ids
    there = cross_entropy(score, local.anchor, local.rest, gathered.rest, shared, ids, smoothing)
    back = cross_entropy(turned, local.rest, local.anchor, gathered.anchor, shared, ids, smoothing)
    return TupleLosses((there.loss + back.loss) / 2, there.own, (there.on_top + back.on_top) / 2)


def cross_entropy(
    score: Score,
    rows: Tensors,
    own: Tensors,
    columns: Tensors,
    shared: Tensors,
    ids: tuple[Int[Tensor, " b"], Int[Tensor, " n"]],
    smoothing: float = 0.0,
) -> TupleLosses:
    """For each row, -log softmax of the score of its own column against the columns of other ids.

    `own` are the columns that belong to the rows, one each. Columns of the row's id other than its own are neither
    positive nor negative. `smoothing` moves that part of the target to the mean over the row's own column and its
    negatives. Memory: O(b d + n d) and one tile.
    """
    valid = torch.ones(len(ids[1]), dtype=torch.bool, device=ids[1].device)
    others, best = autograd.logsumexp_of_score(score, rows, columns, shared, valid, exclude_same_id=ids)
    logits = one_by_one(score, rows, own, shared)
    log_sum = torch.logaddexp(others, logits)
    losses = log_sum - logits
    if smoothing:
        classes = 1 + len(valid) - count_by_key(ids[1], valid, ids[0])
        mean = (logits + sum_apart(score, rows, columns, shared, ids)) / classes
        losses = torch.lerp(losses, log_sum - mean, smoothing)
    with torch.no_grad():
        rival = one_by_one(score, rows, tuple(c[best] for c in columns), shared)
    on_top = (logits > rival) | (others == -torch.inf)
    return TupleLosses(losses, logits, on_top.to(losses.dtype))


def one_by_one(score: Score, rows: Tensors, columns: Tensors, shared: Tensors) -> Float[Tensor, " b"]:
    """The scores of row i with column i: as many tiles of one row and one column."""
    return score(tuple(x[:, None] for x in rows), tuple(x[:, None] for x in columns), shared)[:, 0, 0]


def sum_apart(
    score: Score, rows: Tensors, columns: Tensors, shared: Tensors, ids: tuple[Int[Tensor, " b"], Int[Tensor, " n"]]
) -> Float[Tensor, " b"]:
    """For each row, the sum of its scores over the columns of other ids. Differentiable once; one tile at a time."""

    def counted(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        (*here, row_ids), (*there, column_ids) = rows, columns
        return score(tuple(here), tuple(there), shared).masked_fill(row_ids[:, None] == column_ids, 0)

    rows, columns = (*rows, ids[0]), (*columns, ids[1])
    return _RowSums.apply((counted, len(rows), len(columns)), *rows, *columns, *shared)  # type: ignore[return-value]


class _RowSums(torch.autograd.Function):
    @staticmethod
    @autograd.without_autocast
    def forward(ctx: Any, layout: tuple[Score, int, int], *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        score, b, n = layout
        rows, columns, shared = zip(*_cut(tensors[:b])), list(zip(*_cut(tensors[b : b + n]))), tensors[b + n :]
        return torch.cat([torch.stack([score(r, c, shared).sum(dim=1) for c in columns]).sum(dim=0) for r in rows])

    @staticmethod
    @once_differentiable
    @autograd.without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        score, b, n = ctx.layout
        tensors = ctx.saved_tensors
        cut = [*_cut(tensors[: b + n]), *((x,) for x in tensors[b + n :])]
        cut = [[x.detach().requires_grad_(x.is_floating_point()) for x in pieces] for pieces in cut]
        shared = tuple(x for (x,) in cut[b + n :])
        for weight, *here in zip(grad.split(TILE), *cut[:b]):
            for there in zip(*cut[b : b + n]):
                with torch.enable_grad():
                    total = (score(tuple(here), there, shared).sum(dim=1) * weight).sum()
                total.backward()
        return None, *(torch.cat([x.grad for x in pieces]) if pieces[0].requires_grad else None for pieces in cut)


def _cut(tensors: Tensors) -> list[Tensors]:
    return [x.split(TILE) for x in tensors]

"""Objectives on whole tuples: the rows that have every view, and the softmax that tells a row's tuple from others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.config import unknown
from mvpretrain.distributed.gather import BatchMean
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._settings import Temperature
from mvpretrain.similarity.autograd import Tensors, logsumexp_of_score, without_autocast
from mvpretrain.similarity.groups import count_by_key
from mvpretrain.types import Embeddings

Score = Callable[[Tensors, Tensors, Tensors], Tensor]  # (anchors, rests, shared) -> a tile of scores
TILE = 512  # rows and columns of one tile of `sum_of_negatives`


class AnchoredTupleConfig(ObjectiveConfig):
    """What objectives that put other rows' views in place of one view of a tuple have in common.

    `anchor` is that view: a name, `all` for each in turn, or none for the first. `label_smoothing` spreads that part of
    the target over all candidates (0.1 in the authors' code); it costs one more pass over them.
    """

    anchor: str | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    temperature: Temperature = Temperature()

    def anchor_views(self, views: Sequence[str]) -> list[str]:
        """The anchor views in turn. ValueError: no such view."""
        if self.anchor is not None and self.anchor not in (*views, "all"):
            raise ValueError(unknown("view in objective.anchor", self.anchor, [*views, "all"]))
        return list(views) if self.anchor == "all" else [self.anchor or views[0]]


class Tuples(NamedTuple):
    """The m rows of a table that have every view asked for."""

    z: tuple[Float[Tensor, "m d"], ...]  # by view
    ids: Int[Tensor, " m"]


class TupleFeatures(NamedTuple):
    """What a score needs to know of m tuples, first dimension m: of the anchor, and of the other views (the rest)."""

    anchor: Tensors
    rest: Tensors
    ids: Int[Tensor, " m"]


class TupleLosses(NamedTuple):
    """What the softmax gives each local row."""

    loss: Float[Tensor, " b"]
    own: Float[Tensor, " b"]  # the score of the row's own tuple
    hit: Float[Tensor, " b"]  # 1 where no tuple of another id scores as high; no gradient


class Contrast(NamedTuple):
    """The mean over anchor views of the softmax losses, its parts to log, and the last anchor view's own scores."""

    total: Float[Tensor, ""]
    parts: dict[str, Tensor]
    own: Float[Tensor, " b"]


def complete(table: Embeddings, views: Sequence[str]) -> Tuples:
    """The rows that have all of these views, in float32 at least."""
    has_all = torch.stack([table.present[v] for v in views]).all(dim=0)
    kind = torch.promote_types(table.z[views[0]].dtype, torch.float32)
    return Tuples(tuple(table.z[v][has_all].to(kind) for v in views), table.ids[has_all])


def tuple_mean(local: Embeddings, gathered: Embeddings, tuples: Tuples) -> BatchMean:
    """The mean over all complete tuples, `tuples` those of the gathered table."""
    return BatchMean.over(len(tuples.ids), local, gathered)


def contrast(
    config: AnchoredTupleConfig,
    views: Sequence[str],
    local: Tuples,
    gathered: Tuples,
    mean: BatchMean,
    features: Callable[[Tuples, int], TupleFeatures],
    score: Score,
    temperature: Float[Tensor, "1"],
) -> Contrast:
    """Each anchor view in turn: `features(tuples, its index)` are compared by `score`, in both directions."""
    values, parts, own = [], {}, temperature.new_empty(0)
    for anchor in config.anchor_views(views):
        ours, theirs = (features(tuples, views.index(anchor)) for tuples in (local, gathered))
        losses = both_directions(score, ours, theirs, (temperature,), config.label_smoothing)
        values.append(mean(losses.loss))
        parts[f"loss/{anchor}"] = values[-1].detach()
        parts[f"accuracy/{anchor}"] = mean(losses.hit)
        own = losses.own
    return Contrast(torch.stack(values).mean(), parts, own)


def both_directions(
    score: Score, local: TupleFeatures, gathered: TupleFeatures, shared: Tensors, smoothing: float = 0.0
) -> TupleLosses:
    """The mean of two softmaxes: each local anchor among the gathered rests, each local rest among the anchors.

    `score(anchors, rests, shared)` gives a tile, as in `autograd.logsumexp_of_score`, and a batch of tiles for tensors
    with a leading batch dimension.
    """

    def transposed(rests: Tensors, anchors: Tensors, shared: Tensors) -> Tensor:
        return score(anchors, rests, shared).mT

    ids = local.ids, gathered.ids
    of_anchors = cross_entropy(score, local.anchor, local.rest, gathered.rest, shared, ids, smoothing)
    of_rests = cross_entropy(transposed, local.rest, local.anchor, gathered.anchor, shared, ids, smoothing)
    hit = (of_anchors.hit + of_rests.hit) / 2
    return TupleLosses((of_anchors.loss + of_rests.loss) / 2, of_anchors.own, hit)


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
    negatives, argmax = logsumexp_of_score(score, rows, columns, shared, valid, exclude_same_id=ids)
    logits = paired_scores(score, rows, own, shared)
    log_sum = torch.logaddexp(negatives, logits)
    losses = log_sum - logits
    if smoothing:
        classes = 1 + len(valid) - count_by_key(ids[1], valid, ids[0])
        mean = (logits + sum_of_negatives(score, rows, columns, shared, ids)) / classes
        losses = torch.lerp(losses, log_sum - mean, smoothing)
    with torch.no_grad():
        hardest = paired_scores(score, rows, tuple(c[argmax] for c in columns), shared)
    hit = (logits > hardest) | (negatives == -torch.inf)
    return TupleLosses(losses, logits, hit.to(losses.dtype))


def paired_scores(score: Score, rows: Tensors, columns: Tensors, shared: Tensors) -> Float[Tensor, " b"]:
    """The scores of row i with column i: as many tiles of one row and one column."""
    return score(tuple(x[:, None] for x in rows), tuple(x[:, None] for x in columns), shared)[:, 0, 0]


def sum_of_negatives(
    score: Score, rows: Tensors, columns: Tensors, shared: Tensors, ids: tuple[Int[Tensor, " b"], Int[Tensor, " n"]]
) -> Float[Tensor, " b"]:
    """For each row, the sum of its scores over the columns of other ids. Differentiable once; one tile at a time."""

    def of_other_ids(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        (*row_tensors, row_ids), (*column_tensors, column_ids) = rows, columns
        scores = score(tuple(row_tensors), tuple(column_tensors), shared)
        return scores.masked_fill(row_ids[:, None] == column_ids, 0)

    rows, columns = (*rows, ids[0]), (*columns, ids[1])
    layout = (of_other_ids, len(rows), len(columns))
    return _RowSums.apply(layout, *rows, *columns, *shared)  # type: ignore[return-value]


class _RowSums(torch.autograd.Function):
    """`layout` is (score, number of tensors of rows, of columns); the tensors follow in order."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, layout: tuple[Score, int, int], *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        score, b, n = layout
        rows, columns, shared = zip(*_cut(tensors[:b])), list(zip(*_cut(tensors[b : b + n]))), tensors[b + n :]
        return torch.cat([torch.stack([score(r, c, shared).sum(dim=1) for c in columns]).sum(dim=0) for r in rows])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        score, b, n = ctx.layout
        tensors = ctx.saved_tensors
        cut = [*_cut(tensors[: b + n]), *((x,) for x in tensors[b + n :])]
        cut = [[x.detach().requires_grad_(x.is_floating_point()) for x in pieces] for pieces in cut]
        shared = tuple(x for (x,) in cut[b + n :])
        for weight, *rows in zip(grad.split(TILE), *cut[:b]):
            for columns in zip(*cut[b : b + n]):
                with torch.enable_grad():
                    total = (score(tuple(rows), columns, shared).sum(dim=1) * weight).sum()
                total.backward()
        return None, *(torch.cat([x.grad for x in pieces]) if pieces[0].requires_grad else None for pieces in cut)


def _cut(tensors: Tensors) -> list[Tensors]:
    return [x.split(TILE) for x in tensors]

"""Sums over scaled similarities, differentiable, tile by tile: b x n numbers are never held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from mvpretrain.similarity import blockwise
from mvpretrain.similarity.blockwise import OnlineLogSumExp, PairMask, finite, scaled_tiles, slices

Tensors = tuple[Tensor, ...]
LOG_ZERO = -1e30  # stands for log 0, of which the gradient of a log-sum-exp would make NaN


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast off: in bfloat16, similarities of scale 100 would be off by whole units."""

    @wraps(function)
    def exact(ctx: Any, *arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(ctx, *arguments)

    return exact


def logsumexp(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    valid: Bool[Tensor, " n"],
    exclude_same_id: tuple[Int[Tensor, " b"], Int[Tensor, " n"]] | None = None,
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """For each row i: log sum_j exp(scale <row_i, column_j>) over valid columns, and the j of the largest term.

    `exclude_same_id` is (ids of rows, ids of columns): with it, columns of the row's own id are left out too. A row
    that no column is left for gets -inf (no gradient) and index 0. Differentiable once, in rows, columns and scale; the
    backward recomputes the tiles: d lse_i / d row_i = scale sum_j p_ij column_j with p = softmax, and so on. Memory:
    O(b d + n d) plus one tile.
    """
    mask = PairMask(torch.ones(len(rows), dtype=torch.bool, device=rows.device), valid, *(exclude_same_id or ()))
    return _LogSumExp.apply(rows, columns, scale, mask)  # type: ignore[return-value]


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, rows, columns, scale, mask):
        found, _ = blockwise.forward(rows, columns, scale, mask, both=False)
        ctx.save_for_backward(rows, columns, scale, found.lse)
        ctx.mask = mask
        ctx.mark_non_differentiable(found.argmax)
        return found.lse, found.argmax

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        rows, columns, scale, lse = ctx.saved_tensors
        to_rows, to_columns = blockwise.backward(rows, columns, scale, ctx.mask, (lse, grad), None)
        # sum_ij G_ij <row_i, column_j> without another tile: it is <rows, G columns>.
        to_scale = (to_rows * rows).sum().reshape(scale.shape)
        return to_rows * scale, to_columns * scale, to_scale, None


def add_log_sums(log_sums: Sequence[Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
    """The logarithm of the sum of sums; LOG_ZERO where all are of nothing."""
    return torch.stack(list(log_sums)).clamp_min(LOG_ZERO).logsumexp(dim=0)


def softplus_sum(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    valid: Bool[Tensor, " n"],
) -> Float[Tensor, " b"]:
    """For each row i: sum of log(1 + exp(scale <row_i, column_j> + bias)) over valid columns.

    Differentiable once, in rows, columns, scale and bias. Memory: O(b d + n d) plus one tile.
    """
    return _SoftplusSum.apply(rows, columns, scale, bias, valid)  # type: ignore[return-value]


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, rows, columns, scale, bias, valid):
        total = rows.new_zeros(len(rows))
        for i, _, tile in scaled_tiles(rows, columns, scale, PairMask(valid.new_ones(len(rows)), valid)):
            total[i] += softplus(tile.add_(bias), threshold=50).sum(dim=1)
        ctx.save_for_backward(rows, columns, scale, bias, valid)
        return total

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad):  # type: ignore[override]
        rows, columns, scale, bias, valid = ctx.saved_tensors
        to_rows, to_columns, to_bias = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(bias)
        for i, j, tile in scaled_tiles(rows, columns, scale, PairMask(valid.new_ones(len(rows)), valid)):
            weight = tile.add_(bias).sigmoid_().mul_(grad[i, None])
            to_bias += weight.sum()
            to_rows[i].addmm_(weight, columns[j])
            to_columns[j].addmm_(weight.T, rows[i])
        to_scale = (to_rows * rows).sum().reshape(scale.shape)
        return to_rows * scale, to_columns * scale, to_scale, to_bias, None


def logsumexp_of_score(
    score: Callable[[Tensors, Tensors, Tensors], Tensor],
    rows: Tensors,
    columns: Tensors,
    shared: Tensors,
    valid: Bool[Tensor, " n"],
    exclude_same_id: tuple[Int[Tensor, " b"], Int[Tensor, " n"]] | None = None,
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """`logsumexp` of any score: `score(rows[i], columns[j], shared)` gives the tile of a block of rows and of columns.

    `rows` and `columns` are tensors whose first dimension is cut into blocks, `shared` are whole. The score is a pure
    function; autograd differentiates it in one tile at a time. Differentiable once, in all three.
    """
    layout = (score, len(rows), len(columns), valid, exclude_same_id)
    return _LogSumExpOfScore.apply(layout, *rows, *columns, *shared)  # type: ignore[return-value]


class _LogSumExpOfScore(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, layout, *tensors: Tensor):
        score, b, n, valid, exclude_same_id = layout
        found = OnlineLogSumExp(len(tensors[0]), tensors[0])
        for i in slices(len(tensors[0]), blockwise.ROWS):
            for j in slices(len(valid), blockwise.COLUMNS):
                tile = _masked(score(*_blocks(tensors, b, n, i, j)), valid, exclude_same_id, i, j)
                peak = tile.amax(dim=1)
                found.update_argmax(i, j.start, peak, lambda at, tile=tile: tile[at].argmax(dim=1))
                found.add(i, peak, (tile - finite(peak)[:, None]).exp().sum(dim=1))
        sums = found.sums()
        ctx.layout = layout
        ctx.save_for_backward(sums.lse, *tensors)
        ctx.mark_non_differentiable(sums.argmax)
        return sums.lse, sums.argmax

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        score, b, n, valid, exclude_same_id = ctx.layout
        lse, *tensors = ctx.saved_tensors
        lse, grad = blockwise.without_empty(lse, grad)
        total = [torch.zeros_like(x) if need else None for x, need in zip(tensors, ctx.needs_input_grad[1:])]
        for i in slices(len(lse), blockwise.ROWS):
            for j in slices(len(valid), blockwise.COLUMNS):
                leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in _flat(_blocks(tensors, b, n, i, j))]
                with torch.enable_grad():
                    tile = score(tuple(leaves[:b]), tuple(leaves[b : b + n]), tuple(leaves[b + n :]))
                    weight = (_masked(tile.detach(), valid, exclude_same_id, i, j) - lse[i, None]).exp() * grad[i, None]
                    weighted = (tile * weight).sum()
                wanted = [x for x, t in zip(leaves, total) if t is not None]
                found = iter(torch.autograd.grad(weighted, wanted, allow_unused=True))
                for place, t in enumerate(total):
                    gradient = next(found) if t is not None else None
                    if t is not None and gradient is not None:
                        _part(t, place, b, n, i, j).add_(gradient)
        return None, *total


def _blocks(tensors: Any, b: int, n: int, i: slice, j: slice) -> tuple[Tensors, Tensors, Tensors]:
    parts = tuple(_part(x, place, b, n, i, j) for place, x in enumerate(tensors))
    return parts[:b], parts[b : b + n], parts[b + n :]


def _part(x: Tensor, place: int, b: int, n: int, i: slice, j: slice) -> Tensor:
    """What a tile sees of the tensor at this place: its block of rows, of columns, or all of it."""
    return x[i] if place < b else x[j] if place < b + n else x


def _flat(blocks: tuple[Tensors, Tensors, Tensors]) -> list[Tensor]:
    return [x for part in blocks for x in part]


def _masked(tile: Tensor, valid: Tensor, exclude_same_id: tuple[Tensor, Tensor] | None, i: slice, j: slice) -> Tensor:
    gone = ~valid[j]
    if exclude_same_id is not None:
        gone = gone | (exclude_same_id[0][i, None] == exclude_same_id[1][j])
    return tile.masked_fill(gone, -torch.inf)

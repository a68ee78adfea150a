"""Sums over scaled similarities, or over any score, differentiable, tile by tile: b x n numbers are never held."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from mvpretrain.similarity import blockwise
from mvpretrain.similarity.blockwise import PairMask, scaled_tiles, slices
from mvpretrain.similarity.log_sum_exp import OnlineLogSumExp, finite, without_empty

Tensors = tuple[Tensor, ...]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an autograd function that runs with autocast off: in bfloat16, similarities of scale 100 would be off
    by whole units.
    """

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
    O(b d + n d) and one tile.
    """
    mask = PairMask(torch.ones(len(rows), dtype=torch.bool, device=rows.device), valid, *(exclude_same_id or ()))
    return _LogSumExp.apply(rows, columns, scale, mask)  # type: ignore[return-value]


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, rows, columns, scale, mask):
        sums, _ = blockwise.forward(rows, columns, scale, mask, both=False)
        ctx.save_for_backward(rows, columns, scale, sums.lse)
        ctx.mask = mask
        ctx.mark_non_differentiable(sums.argmax)
        return sums.lse, sums.argmax

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        rows, columns, scale, lse = ctx.saved_tensors
        grad_rows, grad_columns = blockwise.backward(rows, columns, scale, ctx.mask, (lse, grad), None)
        # sum_ij G_ij <row_i, column_j> without another tile: it is <rows, G columns>.
        grad_scale = (grad_rows * rows).sum().reshape(scale.shape)
        return grad_rows * scale, grad_columns * scale, grad_scale, None


def softplus_sum(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    valid: Bool[Tensor, " n"],
) -> Float[Tensor, " b"]:
    """For each row i: sum of log(1 + exp(scale <row_i, column_j> + bias)) over valid columns.

    Differentiable once, in rows, columns, scale and bias. Memory: O(b d + n d) and one tile.
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
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        grad_bias = torch.zeros_like(bias)
        for i, j, tile in scaled_tiles(rows, columns, scale, PairMask(valid.new_ones(len(rows)), valid)):
            weight = tile.add_(bias).sigmoid_().mul_(grad[i, None])
            grad_bias += weight.sum()
            grad_rows[i].addmm_(weight, columns[j])
            grad_columns[j].addmm_(weight.T, rows[i])
        grad_scale = (grad_rows * rows).sum().reshape(scale.shape)
        return grad_rows * scale, grad_columns * scale, grad_scale, grad_bias, None


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
    """`layout` is (score, number of tensors of rows, of columns, valid columns, ids); the tensors follow in order."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, layout, *tensors: Tensor):
        score, b, n, valid, ids = layout
        sums = OnlineLogSumExp.empty(tensors[0], len(tensors[0]))
        for i in slices(len(tensors[0]), blockwise.ROWS):
            for j in slices(len(valid), blockwise.COLUMNS):
                tile = _masked(score(*_blocks(tensors, b, n, i, j)), valid, ids, i, j)
                top = tile.amax(dim=1)
                sums.update_argmax(i, j.start, top, lambda at, tile=tile: tile[at].argmax(dim=1))
                sums.add(i, top + (tile - finite(top)[:, None]).exp().sum(dim=1).log())
        ctx.layout = layout
        ctx.save_for_backward(sums.lse, *tensors)
        ctx.mark_non_differentiable(sums.argmax)
        return sums.lse, sums.argmax

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        score, b, n, valid, ids = ctx.layout
        lse, *tensors = ctx.saved_tensors
        lse, grad = without_empty(lse, grad)
        total = [torch.zeros_like(x) if need else None for x, need in zip(tensors, ctx.needs_input_grad[1:])]
        for i in slices(len(lse), blockwise.ROWS):
            for j in slices(len(valid), blockwise.COLUMNS):
                leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in _flat(_blocks(tensors, b, n, i, j))]
                with torch.enable_grad():
                    tile = score(tuple(leaves[:b]), tuple(leaves[b : b + n]), tuple(leaves[b + n :]))
                    weight = (_masked(tile.detach(), valid, ids, i, j) - lse[i, None]).exp() * grad[i, None]
                    weighted = (tile * weight).sum()
                wanted = [x for x, t in zip(leaves, total) if t is not None]
                gradients = iter(torch.autograd.grad(weighted, wanted, allow_unused=True))
                for index, t in enumerate(total):
                    gradient = next(gradients) if t is not None else None
                    if t is not None and gradient is not None:
                        _block(t, index, b, n, i, j).add_(gradient)
        return None, *total


def _blocks(tensors: Any, b: int, n: int, i: slice, j: slice) -> tuple[Tensors, Tensors, Tensors]:
    """What a tile is made of: (blocks of rows, blocks of columns, whole tensors)."""
    blocks = tuple(_block(x, index, b, n, i, j) for index, x in enumerate(tensors))
    return blocks[:b], blocks[b : b + n], blocks[b + n :]


def _block(x: Tensor, index: int, b: int, n: int, i: slice, j: slice) -> Tensor:
    """What a tile sees of the tensor of this index: its block of rows, of columns, or all of it."""
    return x[i] if index < b else x[j] if index < b + n else x


def _flat(blocks: tuple[Tensors, Tensors, Tensors]) -> list[Tensor]:
    return [x for part in blocks for x in part]


def _masked(tile: Tensor, valid: Tensor, ids: tuple[Tensor, Tensor] | None, i: slice, j: slice) -> Tensor:
    """The tile with -inf at columns that are not valid and, with ids, at those of the row's own id."""
    excluded = ~valid[j]
    if ids is not None:
        excluded = excluded | (ids[0][i, None] == ids[1][j])
    return tile.masked_fill(excluded, -torch.inf)

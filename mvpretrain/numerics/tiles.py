"""Log-sum-exp of scaled similarities, tile by tile: b x n numbers are never held."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 1024, 2048  # one tile of float32 is 8 MiB: it stays near the cores and large enough for the product


def logsumexp(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    valid: Bool[Tensor, " n"],
    apart: tuple[Int[Tensor, " b"], Int[Tensor, " n"]] | None = None,
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """For each row i: log sum_j exp(scale <row_i, column_j>) over valid columns, and the j of the largest term.

    With `apart` = (ids of rows, ids of columns), columns of the row's own id are left out too. A row that no column is
    left for gets -inf (no gradient) and index 0. Differentiable once, in rows, columns and scale; the backward
    recomputes the tiles: d lse_i / d row_i = scale sum_j p_ij column_j with p = softmax, and so on. Memory:
    O(b d + n d) plus one tile of 1,024 x 2,048.
    """
    return _LogSumExp.apply(rows, columns, scale, valid, *(apart or (None, None)))  # type: ignore[return-value]


def _similarity(rows, columns, scale, valid, row_ids, column_ids, i: slice, j: slice) -> Tensor:
    """One tile of scaled similarities, -inf where a column does not count."""
    tile = (rows[i] * scale) @ columns[j].T
    tile.masked_fill_(~valid[j], -torch.inf)
    if row_ids is not None:
        tile.masked_fill_(row_ids[i, None] == column_ids[None, j], -torch.inf)
    return tile


def _slices(length: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast off: in bfloat16, similarities of scale 100 would be off by whole units."""

    @wraps(function)
    def exact(ctx: Any, *tensors: Any) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(ctx, *tensors)

    return exact


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    @_exactly
    def forward(ctx: Any, rows, columns, scale, valid, row_ids, column_ids):
        lse = rows.new_empty(len(rows))
        best = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for i in _slices(len(rows), ROWS):
            top = rows.new_full((i.stop - i.start,), -torch.inf)
            total = torch.zeros_like(top)
            for j in _slices(len(columns), COLUMNS):
                tile = _similarity(rows, columns, scale, valid, row_ids, column_ids, i, j)
                peak, where = tile.max(dim=1)
                best[i] = torch.where(peak > top, where + j.start, best[i])
                new = torch.maximum(top, peak)
                # A row without any column so far has top = -inf; subtracting it would make NaN of nothing.
                safe = new.masked_fill(new == -torch.inf, 0)
                total = total * (top - safe).exp() + tile.sub_(safe[:, None]).exp_().sum(dim=1)
                top = new
            lse[i] = top + total.log()
        ctx.save_for_backward(rows, columns, scale, valid, row_ids, column_ids, lse)
        ctx.mark_non_differentiable(best)
        return lse, best

    @staticmethod
    @once_differentiable
    @_exactly
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        rows, columns, scale, valid, row_ids, column_ids, lse = ctx.saved_tensors
        empty = lse == -torch.inf
        lse, grad = lse.masked_fill(empty, 0), grad.masked_fill(empty, 0)
        to_rows, to_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for i in _slices(len(rows), ROWS):
            for j in _slices(len(columns), COLUMNS):
                tile = _similarity(rows, columns, scale, valid, row_ids, column_ids, i, j)
                weight = tile.sub_(lse[i, None]).exp_().mul_(grad[i, None])
                to_rows[i] += weight @ columns[j]
                to_columns[j] += weight.T @ rows[i]
        # sum_ij g_i p_ij <row_i, column_j> without another tile: it is <rows, sum_j g p column_j>.
        to_scale = (to_rows * rows).sum().reshape(scale.shape)
        return to_rows * scale, to_columns * scale, to_scale, None, None, None

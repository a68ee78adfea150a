"""One pass over the scaled similarities of two tables, tile by tile: closed forms, forward and backward.

A tile is a block of rows times a block of columns; the b x n numbers are never held at once. On a GPU the same two
passes are Triton kernels (`triton.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mvpretrain.similarity.log_sum_exp import LogSumExp, OnlineLogSumExp, finite, or_inf, without_empty

ROWS, COLUMNS = 512, 1024  # one tile of float32 is 2 MiB: it stays near the cores and is large enough for the product
CACHE_BYTES = 2**27  # bytes of tiles that one backward may find ready instead of computing them again
EXP_RANGE = 60.0  # e^60 squared is still a float32: within it, one exponential serves rows and columns


class PairMask(NamedTuple):
    """Which pairs of rows and columns count: both valid and, where ids are given, of different ids."""

    rows: Bool[Tensor, " b"]
    columns: Bool[Tensor, " n"]
    row_ids: Int[Tensor, " b"] | None = None
    column_ids: Int[Tensor, " n"] | None = None


class Compaction(NamedTuple):
    """The indices of the valid rows and columns, for tables of which less than half of either are valid.

    Only the valid ones are then worked on: in a student's views, all rows of the queue are absent.
    """

    rows: Int[Tensor, " r"] | slice
    columns: Int[Tensor, " c"] | slice
    empty: bool  # no row or no column is valid

    @classmethod
    def of(cls, mask: PairMask) -> Compaction | None:
        """None where at least half of the rows and half of the columns are valid."""
        rows, columns = torch.stack([mask.rows.sum(), mask.columns.sum()]).tolist()
        if 2 * rows >= len(mask.rows) and 2 * columns >= len(mask.columns):
            return None
        return cls(_indices(mask.rows, rows), _indices(mask.columns, columns), not rows or not columns)

    def pair_mask(self, mask: PairMask) -> PairMask:
        """The mask of the valid rows and columns alone."""
        valid = mask.rows[self.rows], mask.columns[self.columns]
        if mask.row_ids is None or mask.column_ids is None:
            return PairMask(*valid)
        return PairMask(*valid, mask.row_ids[self.rows], mask.column_ids[self.columns])

    def transposed(self) -> Compaction:
        return Compaction(self.columns, self.rows, self.empty)

    def scatter(self, sums: LogSumExp, valid: Bool[Tensor, " b"]) -> LogSumExp:
        """The valid rows' sums at their positions among all rows; -inf and index 0 elsewhere."""
        argmax = sums.argmax if isinstance(self.columns, slice) else self.columns[sums.argmax]
        whole = LogSumExp(sums.lse.new_full((len(valid),), -torch.inf), torch.zeros_like(valid, dtype=torch.int64))
        whole.lse[self.rows], whole.argmax[self.rows] = sums.lse, argmax.masked_fill(sums.lse == -torch.inf, 0)
        return whole


def _indices(valid: Tensor, count: int) -> Tensor | slice:
    return slice(None) if count == len(valid) else valid.nonzero().squeeze(1)


class TileCache:
    """Tiles of a forward pass that its backward takes instead of computing them again, up to `CACHE_BYTES`.

    Small batches, where the objective costs little memory and some time, save one product of four by it.
    """

    def __init__(self) -> None:
        self.bytes_left = CACHE_BYTES
        self.tiles: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, tile: Tensor) -> None:
        size = tile.numel() * tile.element_size()
        if size <= self.bytes_left:
            self.tiles[key] = tile.clone()
            self.bytes_left -= size

    def take(self, key: Hashable) -> Tensor | None:
        return self.tiles.pop(key, None)


def forward(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    mask: PairMask,
    both: bool,
    cache: tuple[TileCache, Hashable] | None = None,
) -> tuple[LogSumExp, LogSumExp | None]:
    """The sums over columns for each row and, if `both`, over rows for each column, from one product a tile.

    No gradient. A row or column that is paired with nothing has lse -inf and argmax 0. Memory: one tile, and the tiles
    that are put into `cache` = (cache, name) under that name.
    """
    if compact := Compaction.of(mask):
        if compact.empty:
            empty = [OnlineLogSumExp.empty(rows, len(x)).result() for x in (rows, columns)]
            return empty[0], empty[1] if both else None
        row, column = forward(rows[compact.rows], columns[compact.columns], scale, compact.pair_mask(mask), both, cache)
        return (
            compact.scatter(row, mask.rows),
            compact.transposed().scatter(column, mask.columns) if column else None,
        )
    if _on_gpu(rows, columns):
        return _fused_forward(rows, columns, scale, mask, both)
    by_row = OnlineLogSumExp.empty(rows, len(rows))
    by_column = OnlineLogSumExp.empty(rows, len(columns)) if both else None
    for i, j, tile in scaled_tiles(rows, columns, scale, mask):
        if cache:
            cache[0].put((cache[1], i.start, j.start), tile)
        row_top = tile.amax(dim=1)
        by_row.update_argmax(i, j.start, row_top, lambda at, tile=tile: tile[at].argmax(dim=1))
        if by_column:
            column_top = tile.amax(dim=0)
            by_column.update_argmax(j, i.start, column_top, lambda at, tile=tile: tile[:, at].argmax(dim=0))
            _add_both(tile, (by_row, i, row_top), (by_column, j, column_top))
        else:
            by_row.add(i, row_top + tile.sub_(finite(row_top)[:, None]).exp_().sum(dim=1).log())
    return by_row.result(), by_column.result() if by_column else None


def _add_both(
    tile: Tensor, by_row: tuple[OnlineLogSumExp, slice, Tensor], by_column: tuple[OnlineLogSumExp, slice, Tensor]
) -> None:
    """Add a tile, which is overwritten, to the (sums, slice, largest term) of its rows and of its columns."""
    (rows, i, row_top), (columns, j, column_top) = by_row, by_column
    top = row_top.amax()
    if top == -torch.inf:
        return
    low = torch.minimum(or_inf(row_top).amin(), or_inf(column_top).amin())
    if top - low < EXP_RANGE:
        tile.sub_(top).exp_()
        rows.add(i, top.expand_as(row_top) + tile.sum(dim=1).log())
        columns.add(j, top.expand_as(column_top) + tile.sum(dim=0).log())
    else:
        rows.add(i, row_top + (tile - finite(row_top)[:, None]).exp_().sum(dim=1).log())
        columns.add(j, column_top + tile.sub_(finite(column_top)).exp_().sum(dim=0).log())


def backward(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    mask: PairMask,
    by_row: tuple[Float[Tensor, " b"], Float[Tensor, " b"]],
    by_column: tuple[Float[Tensor, " n"], Float[Tensor, " n"]] | None,
    cache: tuple[TileCache, Hashable] | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "n d"]]:
    """(G columns, G^T rows) with G_ij = g_i e^(s_ij - lse_i) + h_j e^(s_ij - lse_j), the factor `scale` left out.

    `by_row` is (lse, its gradient g) of the rows, `by_column` (lse, h) of the columns; the sums may be over more than
    these rows and columns. Sums that are -inf have no gradient. `wanted` says whether the rows' and the columns'
    gradient is asked for; the other stays 0. Cost: one product recomputes a tile that is not in `cache`, two use it.
    """
    if compact := Compaction.of(mask):
        grad_rows, grad_columns = (x.new_zeros(x.shape, dtype=by_row[0].dtype) for x in (rows, columns))
        if not compact.empty:
            i, j = compact.rows, compact.columns
            sums = (by_row[0][i], by_row[1][i]), (by_column[0][j], by_column[1][j]) if by_column else None
            small = rows[i], columns[j], scale, compact.pair_mask(mask)
            grad_rows[i], grad_columns[j] = backward(*small, *sums, cache, wanted)
        return grad_rows, grad_columns
    if _on_gpu(rows, columns):
        return _fused_backward(rows, columns, scale, mask, by_row, by_column)
    row_lse, row_grad = without_empty(*by_row)
    column_lse, column_grad = without_empty(*by_column) if by_column else (None, None)
    grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for i, j, tile in scaled_tiles(rows, columns, scale, mask, cache):
        of_columns = None if column_lse is None or column_grad is None else (column_lse[j], column_grad[j])
        weight = _weight(tile, (row_lse[i], row_grad[i]), of_columns)
        if wanted[0]:
            grad_rows[i].addmm_(weight, columns[j])
        if wanted[1]:
            grad_columns[j].addmm_(weight.T, rows[i])
    return grad_rows, grad_columns


def _weight(tile: Tensor, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor] | None) -> Tensor:
    """G of one tile, which is overwritten."""
    lse, grad = by_row
    if by_column is None:
        return tile.sub_(lse[:, None]).exp_().mul_(grad[:, None])
    column_lse, column_grad = by_column
    top = tile.amax()
    if not top.isfinite():
        return tile.zero_() if top < 0 else tile
    if top - torch.minimum(lse.amin(), column_lse.amin()) < EXP_RANGE:
        factor = (grad * (top - lse).exp())[:, None] + (column_grad * (top - column_lse).exp())
        return tile.sub_(top).exp_().mul_(factor)
    other = (tile - column_lse).exp_().mul_(column_grad)
    return tile.sub_(lse[:, None]).exp_().mul_(grad[:, None]).add_(other)


def scaled_tiles(
    rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask, cache: tuple[TileCache, Hashable] | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, scaled similarities) of each tile, -inf where a pair does not count; the buffer is used again.

    Tiles without a valid row or without a valid column are left out: nothing in them counts.
    """
    buffer = rows.new_empty(ROWS * COLUMNS)  # one allocation: pages that are mapped anew cost as much as the product
    column_blocks = [(j, *any_and_all(mask.columns[j])) for j in slices(len(columns), COLUMNS)]
    for i in slices(len(rows), ROWS):
        any_row, all_rows = any_and_all(mask.rows[i])
        if not any_row:
            continue
        scaled = rows[i] * scale
        for j, any_column, all_columns in column_blocks:
            if not any_column:
                continue
            kept = cache and cache[0].take((cache[1], i.start, j.start))
            if kept is not None:
                yield i, j, kept
                continue
            size = i.stop - i.start, j.stop - j.start
            tile = torch.mm(scaled, columns[j].T, out=buffer[: size[0] * size[1]].view(size))
            if not all_rows:
                tile.masked_fill_(~mask.rows[i, None], -torch.inf)
            if not all_columns:
                tile.masked_fill_(~mask.columns[j], -torch.inf)
            if mask.row_ids is not None and mask.column_ids is not None:
                tile.masked_fill_(mask.row_ids[i, None] == mask.column_ids[j], -torch.inf)
            yield i, j, tile


def any_and_all(valid: Tensor) -> tuple[bool, bool]:
    return bool(valid.any()), bool(valid.all())


def _on_gpu(rows: Tensor, columns: Tensor) -> bool:
    if not rows.is_cuda:
        return False
    from mvpretrain.similarity import triton  # Triton is not on every machine, and takes a second to load

    return triton.usable(rows, columns)


def _fused_forward(
    rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask, both: bool
) -> tuple[LogSumExp, LogSumExp | None]:
    from mvpretrain.similarity import triton

    row_lse, row_argmax, column_lse, column_argmax = triton.forward(rows, columns, scale.float(), *mask, both=both)
    by_column = None if column_lse is None or column_argmax is None else LogSumExp(column_lse, column_argmax)
    return LogSumExp(row_lse.masked_fill(~mask.rows, -torch.inf), row_argmax), by_column


def _fused_backward(rows, columns, scale: Tensor, mask: PairMask, by_row, by_column) -> tuple[Tensor, Tensor]:
    from mvpretrain.similarity import triton

    column_lse, column_grad = by_column or (None, None)
    return triton.backward(rows, columns, scale.float(), *mask, by_row[0], column_lse, by_row[1], column_grad)


def slices(length: int, step: int) -> list[slice]:
    """Slices of at most `step` that cover `length`."""
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]

"""One pass over the scaled similarities of two tables, tile by tile: closed forms, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROWS, COLUMNS = 512, 1024  # one tile of float32 is 2 MiB: it stays near the cores and is large enough for the product
CACHE = 2**27  # bytes of tiles that one backward may find ready instead of computing them again
EXP_RANGE = 60.0  # e^60 squared is still a float32: within it, one exponential serves rows and columns


class PairMask(NamedTuple):
    """Which pairs of rows and columns count: both valid and, where ids are given, of different ids."""

    rows: Bool[Tensor, " b"]
    columns: Bool[Tensor, " n"]
    row_ids: Int[Tensor, " b"] | None = None
    column_ids: Int[Tensor, " n"] | None = None


class LogSumExp(NamedTuple):
    """For each row (or column): log-sum-exp over what it is paired with, and the index of the largest term."""

    lse: Float[Tensor, " b"]
    argmax: Int[Tensor, " b"]


class Compaction(NamedTuple):
    """The places of the rows and columns that are valid, where either are less than half.

    Then they are worked on alone: in the students' views, all rows of a queue are absent.
    """

    rows: Int[Tensor, " r"] | slice
    columns: Int[Tensor, " c"] | slice
    empty: bool

    @classmethod
    def of(cls, mask: PairMask) -> Compaction | None:
        rows, columns = torch.stack([mask.rows.sum(), mask.columns.sum()]).tolist()
        if 2 * rows >= len(mask.rows) and 2 * columns >= len(mask.columns):
            return None
        return cls(_indices(mask.rows, rows), _indices(mask.columns, columns), not rows or not columns)

    def pair_mask(self, mask: PairMask) -> PairMask:
        valid = mask.rows[self.rows], mask.columns[self.columns]
        if mask.row_ids is None or mask.column_ids is None:
            return PairMask(*valid)
        return PairMask(*valid, mask.row_ids[self.rows], mask.column_ids[self.columns])

    def transposed(self) -> Compaction:
        return Compaction(self.columns, self.rows, self.empty)

    def scatter(self, sums: LogSumExp, valid: Bool[Tensor, " b"]) -> Sums:
        """The sums of the rows that are worked on, as those of all rows."""
        argmax = sums.argmax if isinstance(self.columns, slice) else self.columns[sums.argmax]
        whole = LogSumExp(sums.lse.new_full((len(valid),), -torch.inf), torch.zeros_like(valid, dtype=torch.int64))
        whole.lse[self.rows], whole.argmax[self.rows] = sums.lse, argmax.masked_fill(sums.lse == -torch.inf, 0)
        return whole


def _indices(valid: Tensor, count: int) -> Tensor | slice:
    return slice(None) if count == len(valid) else valid.nonzero().squeeze(1)


class TileCache:
    """Tiles of a forward pass that its backward takes instead of computing them again: those that fit a fixed room.

    Small batches, where the objective costs little memory and some time, save one product of four by it.
    """

    def __init__(self) -> None:
        self.left = CACHE
        self.tiles: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, tile: Tensor) -> None:
        size = tile.numel() * tile.element_size()
        if size <= self.left:
            self.tiles[key] = tile.clone()
            self.left -= size

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
    """Sums over columns for each row and, if `both`, over rows for each column, from one product a tile.

    No gradient. A row or column that is paired with nothing has lse and top -inf and best 0. Memory: one tile,
    and those put into `cache` under the given name.
    """
    if compact := Compaction.of(mask):
        if compact.empty:
            return OnlineLogSumExp(len(rows), rows).sums(), OnlineLogSumExp(len(columns), rows).sums() if both else None
        found = forward(rows[compact.rows], columns[compact.columns], scale, compact.pair_mask(mask), both, cache)
        return compact.scatter(found[0], mask.rows), compact.transposed().scatter(found[1], mask.columns) if found[
            1
        ] else None
    if _on_gpu(rows, columns):
        return _fused_forward(rows, columns, scale, mask, both)
    by_row = OnlineLogSumExp(len(rows), rows)
    by_column = OnlineLogSumExp(len(columns), rows) if both else None
    for i, j, tile in scaled_tiles(rows, columns, scale, mask):
        if cache:
            cache[0].put((cache[1], i.start, j.start), tile)
        row_peak = tile.amax(dim=1)
        by_row.update_argmax(i, j.start, row_peak, lambda at, tile=tile: tile[at].argmax(dim=1))
        if not by_column:
            by_row.add(i, row_peak, tile.sub_(finite(row_peak)[:, None]).exp_().sum(dim=1))
            continue
        peak = tile.amax(dim=0)
        by_column.update_argmax(j, i.start, peak, lambda at, tile=tile: tile[:, at].argmax(dim=0))
        top = row_peak.amax()
        if top == -torch.inf:
            continue
        low = torch.minimum(_or_inf(row_peak).amin(), _or_inf(peak).amin())
        if top - low < EXP_RANGE:
            tile.sub_(top).exp_()
            by_row.add(i, top.expand_as(row_peak), tile.sum(dim=1))
            by_column.add(j, top.expand_as(peak), tile.sum(dim=0))
        else:
            by_row.add(i, row_peak, (tile - finite(row_peak)[:, None]).exp_().sum(dim=1))
            by_column.add(j, peak, tile.sub_(finite(peak)).exp_().sum(dim=0))
    return by_row.sums(), by_column.sums() if by_column else None


def backward(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    mask: PairMask,
    by_row: tuple[Float[Tensor, " b"], Float[Tensor, " b"]],
    by_column: tuple[Float[Tensor, " n"], Float[Tensor, " n"]] | None,
    cache: tuple[TileCache, Hashable] | None = None,
    sides: tuple[bool, bool] = (True, True),
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "n d"]]:
    """(G columns, G^T rows) with G_ij = g_i e^(s_ij - lse_i) + h_j e^(s_ij - lse_j), the factor `scale` left out.

    `by_row` is (lse, its gradient g) of the rows, `by_column` (lse, h) of the columns: they may be sums over more than
    these rows. One product recomputes a tile, two use it; a side that is not asked for stays 0. -inf sums have no
    gradient.
    """
    if compact := Compaction.of(mask):
        to_rows, to_columns = (x.new_zeros(x.shape, dtype=by_row[0].dtype) for x in (rows, columns))
        if not compact.empty:
            i, j = compact.rows, compact.columns
            sums = (by_row[0][i], by_row[1][i]), (by_column[0][j], by_column[1][j]) if by_column else None
            to_rows[i], to_columns[j] = backward(
                rows[i], columns[j], scale, compact.pair_mask(mask), *sums, cache, sides
            )
        return to_rows, to_columns
    if _on_gpu(rows, columns):
        return _fused_backward(rows, columns, scale, mask, by_row, by_column)
    row_lse, row_grad = without_empty(*by_row)
    column_lse, column_grad = without_empty(*by_column) if by_column else (None, None)
    to_rows, to_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for i, j, tile in scaled_tiles(rows, columns, scale, mask, cache):
        to_column = None if column_lse is None or column_grad is None else (column_lse[j], column_grad[j])
        weight = _weight(tile, (row_lse[i], row_grad[i]), to_column)
        if sides[0]:
            to_rows[i].addmm_(weight, columns[j])
        if sides[1]:
            to_columns[j].addmm_(weight.T, rows[i])
    return to_rows, to_columns


def _weight(tile: Tensor, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor] | None) -> Tensor:
    """G of one tile, in the tile's place."""
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


def without_empty(lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    empty = lse == -torch.inf
    return lse.masked_fill(empty, 0), grad.masked_fill(empty, 0)


def scaled_tiles(
    rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask, cache: tuple[TileCache, Hashable] | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, scaled similarities) of each tile, -inf where a pair does not count; the buffer is used again.

    Tiles without a valid row or without a valid column are left out: nothing in them counts.
    """
    room = rows.new_empty(ROWS * COLUMNS)  # one allocation: pages that are mapped anew cost as much as the product
    there = [(j, *any_and_all(mask.columns[j])) for j in slices(len(columns), COLUMNS)]
    for i in slices(len(rows), ROWS):
        some_rows, all_rows = any_and_all(mask.rows[i])
        if not some_rows:
            continue
        scaled = rows[i] * scale
        for j, some_columns, all_columns in there:
            if not some_columns:
                continue
            kept = cache and cache[0].take((cache[1], i.start, j.start))
            if kept is not None:
                yield i, j, kept
                continue
            size = i.stop - i.start, j.stop - j.start
            tile = torch.mm(scaled, columns[j].T, out=room[: size[0] * size[1]].view(size))
            if not all_rows:
                tile.masked_fill_(~mask.rows[i, None], -torch.inf)
            if not all_columns:
                tile.masked_fill_(~mask.columns[j], -torch.inf)
            if mask.row_ids is not None and mask.column_ids is not None:
                tile.masked_fill_(mask.row_ids[i, None] == mask.column_ids[j], -torch.inf)
            yield i, j, tile


def any_and_all(valid: Tensor) -> tuple[bool, bool]:
    return bool(valid.any()), bool(valid.all())


class OnlineLogSumExp:
    """Sums that grow tile by tile: the online merge of log-sum-exps."""

    def __init__(self, length: int, like: Tensor):
        self.top = like.new_full((length,), -torch.inf)
        self.lse = self.top.clone()
        self.argmax = torch.zeros(length, dtype=torch.int64, device=like.device)

    def add(self, at: slice, shift: Tensor, total: Tensor) -> None:
        self.lse[at] = torch.logaddexp(self.lse[at], shift + total.log())

    def update_argmax(self, at: slice, start: int, peak: Tensor, argmax: Callable[[Tensor], Tensor]) -> None:
        """Look for the place of the peak only where it is a new one: after the first tiles, hardly anywhere."""
        new = (peak > self.top[at]).nonzero().squeeze(1)
        self.argmax[at][new] = argmax(new) + start
        self.top[at][new] = peak[new]

    def sums(self) -> Sums:
        return LogSumExp(self.lse, self.argmax)


def _on_gpu(rows: Tensor, columns: Tensor) -> bool:
    if not rows.is_cuda:
        return False
    from mvpretrain.similarity import triton  # Triton is not on every machine, and takes a second to load

    return triton.usable(rows, columns)


def _fused_forward(
    rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask, both: bool
) -> tuple[LogSumExp, LogSumExp | None]:
    from mvpretrain.similarity import triton

    row_lse, row_best, column_lse, column_best = triton.forward(rows, columns, scale.float(), *mask, both=both)
    by_column = None if column_lse is None or column_best is None else LogSumExp(column_lse, column_best)
    return LogSumExp(row_lse.masked_fill(~mask.rows, -torch.inf), row_best), by_column


def _fused_backward(rows, columns, scale: Tensor, mask: PairMask, by_row, by_column) -> tuple[Tensor, Tensor]:
    from mvpretrain.similarity import triton

    column_lse, column_grad = by_column or (None, None)
    return triton.backward(rows, columns, scale.float(), *mask, by_row[0], column_lse, by_row[1], column_grad)


def finite(peak: Tensor) -> Tensor:
    """Where there is nothing, 0: subtracting -inf would make NaN of it."""
    return peak.masked_fill(peak == -torch.inf, 0)


def _or_inf(peak: Tensor) -> Tensor:
    return peak.masked_fill(peak == -torch.inf, torch.inf)


def slices(length: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]

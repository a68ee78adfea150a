"""Log-sum-exps of similarities at a temperature of each pair's own, tile by tile: closed forms, forward and backward.

A pair's temperature comes from a product of two codes, one a row and one a column, so that codes are all that a tile
needs beside the rows; the b x n numbers are never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvpretrain.similarity import blockwise
from mvpretrain.similarity.autograd import without_autocast
from mvpretrain.similarity.blockwise import Compaction, PairMask, slices
from mvpretrain.similarity.log_sum_exp import LogSumExp, OnlineLogSumExp, finite, without_empty


class PairTemperature(NamedTuple):
    """How a product g of two codes gives a temperature, and how much a temperature costs its pair:

    tau = low + (up - low) sigmoid(-g), and the cost log_weight log tau + inverse_weight / tau.
    """

    low: float
    up: float
    log_weight: float = 0.0
    inverse_weight: float = 0.0


def logsumexp(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    row_codes: Float[Tensor, "b w"],
    column_codes: Float[Tensor, "n w"],
    temperature: PairTemperature,
    mask: PairMask,
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """For each row i: log sum_j exp( s_ij / tau_ij - cost(tau_ij) ), and the j of the largest term.

    s_ij = <row_i, column_j>, tau_ij from <row code i, column code j> (`PairTemperature`), over the pairs that `mask`
    lets count. A row that no column is left for gets -inf (no gradient) and index 0. Differentiable once, in rows,
    columns and both codes; the backward computes the tiles again. Cost: b n (d + w) multiplications forward, three
    times as many backward. Memory: O((b + n)(d + w)) and six tiles.
    """
    compact = Compaction.of(mask)
    if compact is None:
        return _LogSumExp.apply(rows, columns, row_codes, column_codes, temperature, mask)  # type: ignore[return-value]
    if compact.empty:
        nothing = OnlineLogSumExp.empty(rows, len(rows)).result()
        return nothing.lse, nothing.argmax
    i, j = compact.rows, compact.columns
    small = logsumexp(rows[i], columns[j], row_codes[i], column_codes[j], temperature, compact.pair_mask(mask))
    whole = compact.scatter(LogSumExp(*small), mask.rows)
    return whole.lse, whole.argmax


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, rows, columns, row_codes, column_codes, temperature, mask):
        sums = OnlineLogSumExp.empty(rows, len(rows))
        for tile in _tiles(rows, columns, row_codes, column_codes, temperature, mask):
            term = tile.term
            top = term.amax(dim=1)
            sums.update_argmax(tile.rows, tile.columns.start, top, lambda at, term=term: term[at].argmax(dim=1))
            sums.add(tile.rows, top + term.sub_(finite(top)[:, None]).exp_().sum(dim=1).log())
        ctx.temperature, ctx.mask = temperature, mask
        ctx.save_for_backward(rows, columns, row_codes, column_codes, sums.lse)
        ctx.mark_non_differentiable(sums.argmax)
        return sums.lse, sums.argmax

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        *tensors, lse = ctx.saved_tensors
        rows, columns, row_codes, column_codes = tensors
        lse, grad = without_empty(lse, grad)
        law, needed = ctx.temperature, ctx.needs_input_grad
        of_rows, of_columns, of_row_codes, of_column_codes = (torch.zeros_like(x) for x in tensors)
        for i, j, scaled, term, inverse, gate in _tiles(*tensors, law=law, mask=ctx.mask):
            # With weight = grad e^(term - lse): d term / d s = 1 / tau, and
            # d term / d g = ((s - inverse_weight) / tau + log_weight) / tau (up - low) gate (1 - gate).
            weight = term.sub_(lse[i, None]).exp_().mul_(grad[i, None]).mul_(inverse)
            slope = scaled.add_(law.log_weight).mul_(weight).mul_(gate).mul_(gate.neg_().add_(1))
            if needed[0]:
                of_rows[i].addmm_(weight, columns[j])
            if needed[1]:
                of_columns[j].addmm_(weight.T, rows[i])
            if needed[2]:
                of_row_codes[i].addmm_(slope, column_codes[j], alpha=law.up - law.low)
            if needed[3]:
                of_column_codes[j].addmm_(slope.T, row_codes[i], alpha=law.up - law.low)
        return of_rows, of_columns, of_row_codes, of_column_codes, None, None


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    scaled: Tensor  # (s - inverse_weight) / tau
    term: Tensor  # s / tau - cost(tau), -inf where a pair does not count
    inverse: Tensor  # 1 / tau
    gate: Tensor  # sigmoid(-g)


def _tiles(
    rows: Tensor, columns: Tensor, row_codes: Tensor, column_codes: Tensor, law: PairTemperature, mask: PairMask
) -> Iterator[_Tile]:
    """The blocks of pairs; the caller may overwrite them."""
    for i in slices(len(rows), blockwise.ROWS):
        for j in slices(len(columns), blockwise.COLUMNS):
            gate = torch.mm(row_codes[i], column_codes[j].T).neg_().sigmoid_()
            tau = (gate * (law.up - law.low)).add_(law.low)
            inverse = tau.reciprocal()
            scaled = torch.mm(rows[i], columns[j].T).sub_(law.inverse_weight).mul_(inverse)
            term = scaled - tau.log_().mul_(law.log_weight) if law.log_weight else scaled.clone()
            excluded = ~(mask.rows[i, None] & mask.columns[j])
            if mask.row_ids is not None and mask.column_ids is not None:
                excluded |= mask.row_ids[i, None] == mask.column_ids[j]
            yield _Tile(i, j, scaled, term.masked_fill_(excluded, -torch.inf), inverse, gate)

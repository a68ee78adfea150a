"""The kernels of `triton.py`: statistics of tiles of similarities, weights of their gradient, products with weights.

Each launch works on one slab of the b x n pairs, small enough that offsets inside it fit 32 bits; the host passes views
of the tables that begin at the slab. Similarities are in base 2: `scale` comes multiplied by log2(e).
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# no_type_check keeps shape checkers, which rewrite functions at import, from handing Triton their wrapper.


@triton.jit
@no_type_check
def similarity(
    rows, columns, row_valid, column_valid, row_ids, column_ids, scale, b, n, d, i, j,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scaled similarities, -inf where a pair does not count."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside_rows, inside_columns = i < b, j < n
    for start in range(0, d, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < d
        left = tl.load(rows + i[:, None] * d + k[None, :], inside_rows[:, None] & inside[None, :], other=0.0)
        right = tl.load(columns + j[:, None] * d + k[None, :], inside_columns[:, None] & inside[None, :], other=0.0)
        tile = tl.dot(left, tl.trans(right), tile, input_precision=PRECISION)
    row_counts = tl.load(row_valid + i, inside_rows, other=0).to(tl.int1)
    column_counts = tl.load(column_valid + j, inside_columns, other=0).to(tl.int1)
    counts = row_counts[:, None] & column_counts[None, :]
    if row_ids is not None:
        row_id = tl.load(row_ids + i, inside_rows, other=0)
        column_id = tl.load(column_ids + j, inside_columns, other=0)
        counts &= row_id[:, None] != column_id[None, :]
    return tl.where(counts, tile * tl.load(scale), -float("inf"))


@triton.jit
@no_type_check
def summarise(tile, where, AXIS: tl.constexpr):
    """(largest, sum of 2^(x - largest), lowest `where` of the largest) along an axis; (-inf, 0, any) of nothing."""
    top = tl.max(tile, AXIS)
    expanded = tl.expand_dims(top, AXIS)
    # Subtracting -inf from -inf would make NaN of nothing.
    safe = tl.where(expanded == -float("inf"), 0.0, expanded)
    return top, tl.sum(tl.exp2(tile - safe), AXIS), tl.min(tl.where(tile == expanded, where, float("inf")), AXIS)


@triton.jit(do_not_specialize=["b", "n"])
@no_type_check
def statistics(
    rows, columns, row_valid, column_valid, row_ids, column_ids, scale, b, n, d, row_parts, column_parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Summaries of one tile into row_parts [3, column tiles, b] and column_parts [3, row tiles, n] (or None).

    Indices travel as float32, which is exact: those of a slab are below 2**24.
    """
    at_row, at_column = tl.program_id(0), tl.program_id(1)
    i, j = at_row * ROWS + tl.arange(0, ROWS), at_column * COLUMNS + tl.arange(0, COLUMNS)
    tile = similarity(
        rows, columns, row_valid, column_valid, row_ids, column_ids, scale, b, n, d, i, j,
        ROWS, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    top, total, argmax = summarise(tile, j.to(tl.float32)[None, :], 1)
    out, step = row_parts + at_column * b + i, tl.num_programs(1) * b
    tl.store(out, top, i < b)
    tl.store(out + step, total, i < b)
    tl.store(out + 2 * step, argmax, i < b)
    if column_parts is not None:
        top, total, argmax = summarise(tile, i.to(tl.float32)[:, None], 0)
        out, step = column_parts + at_row * n + j, tl.num_programs(0) * n
        tl.store(out, top, j < n)
        tl.store(out + step, total, j < n)
        tl.store(out + 2 * step, argmax, j < n)


@triton.jit(do_not_specialize=["tiles", "length", "offset"])
@no_type_check
def merge(parts, tops, totals, indices, tiles, length, offset, TILES: tl.constexpr, LENGTH: tl.constexpr):
    """Take a slab's parts [3, tiles, length] into the running statistics [length]: the online softmax.

    `offset` is added to the slab's indices.
    """
    at = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    inside = at < length
    top = tl.load(tops + at, inside, other=0.0)
    total = tl.load(totals + at, inside, other=0.0)
    argmax = tl.load(indices + at, inside, other=0)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        exists = (t < tiles)[:, None] & inside[None, :]
        part, step = parts + t[:, None] * length + at[None, :], tiles * length
        part_top = tl.load(part, exists, other=-float("inf"))
        part_total = tl.load(part + step, exists, other=0.0)
        part_argmax = tl.load(part + 2 * step, exists, other=0.0)
        peak = tl.max(part_top, 0)
        where = tl.min(tl.where(part_top == peak[None, :], part_argmax, float("inf")), 0)
        # Earlier tiles keep a draw; where nothing counted the peak is -inf and the index stays 0.
        better = peak > top
        argmax = tl.where(better, tl.where(better, where, 0.0).to(tl.int64) + offset, argmax)
        high = tl.maximum(top, peak)
        safe = tl.where(high == -float("inf"), 0.0, high)
        total = total * tl.exp2(top - safe) + tl.sum(part_total * tl.exp2(part_top - safe[None, :]), 0)
        top = high
    tl.store(tops + at, top, inside)
    tl.store(totals + at, total, inside)
    tl.store(indices + at, argmax, inside)


@triton.jit(do_not_specialize=["b", "n"])
@no_type_check
def gradient_weights(
    rows, columns, row_valid, column_valid, row_ids, column_ids, scale, b, n, d,
    row_lse, row_grad, column_lse, column_grad, gain, weights, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of G times gain into weights [., stride], which hold whole tiles: zero outside the tables."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile = similarity(
        rows, columns, row_valid, column_valid, row_ids, column_ids, scale, b, n, d, i, j,
        ROWS, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    lse, grad = tl.load(row_lse + i, i < b, other=0.0), tl.load(row_grad + i, i < b, other=0.0)
    weight = grad[:, None] * tl.exp2(tile - lse[:, None])
    if column_grad is not None:
        lse, grad = tl.load(column_lse + j, j < n, other=0.0), tl.load(column_grad + j, j < n, other=0.0)
        weight += grad[None, :] * tl.exp2(tile - lse[None, :])
    weight = (weight * tl.load(gain)).to(weights.dtype.element_ty)
    tl.store(weights + i[:, None] * stride + j[None, :], weight)


@triton.jit(do_not_specialize=["m", "k"])
@no_type_check
def product(
    left, right, out, stride_m, stride_k, stride_part, m, k, d, span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part] [m, d] += left [m, k] @ right [k, d] over the part's own `span` of k; left holds whole tiles."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2) * span
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, tl.minimum(first + span, k), DEPTH):
        at = start + tl.arange(0, DEPTH)
        weight = tl.load(left + i[:, None] * stride_m + at[None, :] * stride_k)
        vector = tl.load(right + at[:, None] * d + j[None, :], (at < k)[:, None] & (j < d)[None, :], other=0.0)
        tile = tl.dot(weight, vector, tile, input_precision=PRECISION)
    target = out + tl.program_id(2).to(tl.int64) * stride_part + i[:, None] * d + j[None, :]
    inside = (i < m)[:, None] & (j < d)[None, :]
    tl.store(target, tl.load(target, inside, other=0.0) + tile, inside)

"""Log-sum-exp of scaled similarities and its gradient on a GPU, by Triton kernels; b x n numbers are never held.

The b x n pairs are worked through in slabs. Forward, a slab's tiles are summarised along rows and along columns at once
and the summaries are folded into running ones (online softmax): 2 b n d operations for both directions. Backward, the
weights G of a slab go to a scratch of 128 MiB, and two products take them into the gradients: 6 b n d operations.
Keeping G in registers, as flash attention does, would leave no room for the gradient above d = 256: cutting d over
programs computes the similarities again for each cut and each direction, 12 b n d at d = 512 and 20 b n d at 1,024,
where writing and reading G once costs 6 bytes a pair. Nothing is added atomically: equal inputs give equal bits.

Precision: products and sums are float32. float32 tables are multiplied exactly ("ieee"), or as TF32 where
torch.backends.cuda.matmul.allow_tf32 says so. With 16-bit tables G is rounded to their type, a relative error of 2^-8
(bfloat16) or 2^-11 (float16) a pair: a gradient of row i is off by at most that times
(|g_i| + sum_j |h_j| p_ij) max |column|.

Tested under Triton's interpreter and compiled for compute capability 8.0 and 9.0; it has not run on a GPU yet, and the
sides of its tiles are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIM = 2048  # the largest d: with it, offsets inside a slab stay below 2**31
SCRATCH = 2**27  # bytes of one slab's weights
SLAB_ROWS = 8192  # rows of a slab, more where columns are few
MULTIPLE = 128  # a multiple of every tile's sides
PROGRAMS = 256  # about two for each processor of a large GPU; fixed, so that every GPU sums in the same order


def usable(rows: Tensor, columns: Tensor) -> bool:
    """Whether `forward` and `backward` take these tables: 16 bits or float32, d <= 2,048, an NVIDIA GPU (8.0 on)."""
    return (
        rows.is_cuda
        and columns.is_cuda
        and rows.dtype == columns.dtype
        and rows.dtype in DTYPES
        and 0 < rows.shape[1] <= DIM
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and find_spec("triton") is not None
    )


def forward(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    row_valid: Bool[Tensor, " b"],
    column_valid: Bool[Tensor, " n"],
    row_ids: Int[Tensor, " b"] | None = None,
    column_ids: Int[Tensor, " n"] | None = None,
    both: bool = True,
) -> tuple[
    Float[Tensor, " b"],
    Int[Tensor, " b"],
    Float[Tensor, " n"] | None,
    Int[Tensor, " n"] | None,
]:
    """(row_lse, row_argmax, column_lse, column_argmax): log sum e^(scale <row_i, column_j>) over j, over i if `both`.

    A pair counts where both are valid and, with ids, their ids differ. argmax is the index of the largest term, the
    lowest of equal ones. What is paired with nothing has lse -inf and argmax 0. lse is float32. Memory: 24 bytes a row
    and column, and 32 MiB.
    """
    from mvpretrain.similarity import triton_kernels

    tables = _Tables.of(rows, columns, scale, row_valid, column_valid, row_ids, column_ids)
    blocks = _blocks(rows, rows.shape[1])
    by_row, by_column = _OnlineLogSumExp.of(rows), _OnlineLogSumExp.of(columns) if both else None
    with torch.cuda.device_of(rows):
        for i, j in _slabs(rows, columns):
            b, n = i.stop - i.start, j.stop - j.start
            grid = math.ceil(b / blocks.ROWS), math.ceil(n / blocks.COLUMNS)
            row_parts = tables.scale.new_empty(3, grid[1], b)
            column_parts = tables.scale.new_empty(3, grid[0], n) if both else None
            _launch(triton_kernels.statistics, grid, *tables.slab(i, j), row_parts, column_parts, **blocks._asdict())
            by_row.merge(row_parts, i, j.start)
            if by_column is not None and column_parts is not None:
                by_column.merge(column_parts, j, i.start)
    column_lse, column_argmax = by_column.result() if by_column else (None, None)
    return *by_row.result(), column_lse, column_argmax


def backward(
    rows: Float[Tensor, "b d"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, "1"],
    row_valid: Bool[Tensor, " b"],
    column_valid: Bool[Tensor, " n"],
    row_ids: Int[Tensor, " b"] | None,
    column_ids: Int[Tensor, " n"] | None,
    row_lse: Float[Tensor, " b"],
    column_lse: Float[Tensor, " n"] | None,
    row_grad: Float[Tensor, " b"],
    column_grad: Float[Tensor, " n"] | None,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "n d"]]:
    """(G columns, G^T rows), G_ij = row_grad_i e^(s_ij - row_lse_i) + column_grad_j e^(s_ij - column_lse_j).

    Over the pairs that count in `forward`, in float32, without the factor `scale`. The lse may be sums over more than
    these tables; those of -inf have no gradient. Without column_grad only the first term counts. Memory: the two
    results, 128 MiB for a slab of G, and at most 16 MiB for parts of a small result.
    """
    from mvpretrain.similarity import triton_kernels

    tables = _Tables.of(rows, columns, scale, row_valid, column_valid, row_ids, column_ids)
    blocks = _blocks(rows, rows.shape[1])
    by_row = _base_2(row_lse, row_grad)
    by_column = None if column_lse is None or column_grad is None else _base_2(column_lse, column_grad)
    gain = _gain(by_row, by_column)
    with torch.cuda.device_of(rows):
        grad_rows, grad_columns = _Gradient.of(rows), _Gradient.of(columns)
        scratch = rows.new_empty(
            min(SCRATCH // rows.element_size(), _rounded_up(len(rows)) * _rounded_up(len(columns)))
        )
        for i, j in _slabs(rows, columns):
            b, n = i.stop - i.start, j.stop - j.start
            weights = scratch[: _rounded_up(b) * _rounded_up(n)].view(_rounded_up(b), _rounded_up(n))
            grid = weights.shape[0] // blocks.ROWS, weights.shape[1] // blocks.COLUMNS
            of_columns = by_column[:, j] if by_column is not None else (None, None)
            sums = *by_row[:, i], *of_columns, gain
            _launch(
                triton_kernels.gradient_weights,
                grid,
                *tables.slab(i, j),
                *sums,
                weights,
                weights.shape[1],
                **blocks._asdict(),
            )
            grad_rows.add(weights, tables.columns[j], i)
            grad_columns.add(weights.T, tables.rows[i], j)
    return grad_rows.total(gain), grad_columns.total(gain)


class _Tables(NamedTuple):
    """What the similarities of a slab are made of, in the order of the kernels' arguments."""

    rows: Tensor
    columns: Tensor
    row_valid: Tensor
    column_valid: Tensor
    row_ids: Tensor | None
    column_ids: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, rows, columns, scale, row_valid, column_valid, row_ids, column_ids) -> _Tables:
        given = rows, columns, row_valid, column_valid, row_ids, column_ids
        dense: list[Any] = [x if x is None else x.contiguous() for x in given]
        return cls(*dense, scale=scale.float() * math.log2(math.e))

    def slab(self, i: slice, j: slice) -> list[Any]:
        """Views of the tables that begin at a slab, the scale, and the slab's sizes b, n, d."""
        by_side = [x if x is None else x[(i, j)[at % 2]] for at, x in enumerate(self[:-1])]
        return [*by_side, self.scale, i.stop - i.start, j.stop - j.start, self.rows.shape[1]]


class _OnlineLogSumExp(NamedTuple):
    """Statistics over the slabs so far: the largest exponent of 2, the sum relative to it, the index of the largest."""

    top: Float[Tensor, " b"]
    total: Float[Tensor, " b"]
    argmax: Int[Tensor, " b"]

    @classmethod
    def of(cls, table: Tensor) -> _OnlineLogSumExp:
        zeros = torch.zeros(len(table), device=table.device)
        return cls(zeros - torch.inf, zeros, torch.zeros_like(zeros, dtype=torch.int64))

    def merge(self, parts: Tensor, at: slice, offset: int) -> None:
        from mvpretrain.similarity import triton_kernels

        _, tiles, length = parts.shape
        grid = (math.ceil(length / 64),)
        running = (x[at] for x in self)
        _launch(triton_kernels.merge, grid, parts, *running, tiles, length, offset, TILES=32, LENGTH=64)

    def result(self) -> tuple[Tensor, Tensor]:
        return (self.top + self.total.log2()) * math.log(2), self.argmax


class _Gradient(NamedTuple):
    """The gradient of a table, in parts where its rows alone would not keep a GPU busy."""

    parts: Float[Tensor, "p b d"]
    blocks: _Blocks

    @classmethod
    def of(cls, table: Tensor) -> _Gradient:
        b, d = table.shape
        blocks = _blocks(table, MULTIPLE)
        # No exponentials to hide: one program with all registers, and further ahead with its loads.
        blocks = blocks._replace(COLUMNS=min(blocks.COLUMNS, _power_of_2(d)), num_stages=4, maxnreg=None)
        programs = max(1, math.ceil(min(b, SLAB_ROWS) / blocks.ROWS) * math.ceil(d / blocks.COLUMNS))
        return cls(torch.zeros(max(1, PROGRAMS // programs), b, d, device=table.device), blocks)

    def add(self, weights: Tensor, table: Tensor, at: slice) -> None:
        """Add weights [m, k] @ table [k, d] to the rows `at`; the weights hold whole tiles, m and k rounded up."""
        from mvpretrain.similarity import triton_kernels

        (k, d), m = table.shape, at.stop - at.start
        span = _rounded_up(math.ceil(k / len(self.parts)))
        grid = math.ceil(m / self.blocks.ROWS), math.ceil(d / self.blocks.COLUMNS), math.ceil(k / span)
        out, strides = self.parts[:, at], (*weights.stride(), self.parts.stride(0))
        _launch(triton_kernels.product, grid, weights, table, out, *strides, m, k, d, span, **self.blocks._asdict())

    def total(self, gain: Tensor) -> Tensor:
        """The sum of the parts, `gain` taken out again."""
        return self.parts.sum(0).div_(gain) if len(self.parts) > 1 else self.parts[0].div_(gain)


class _Blocks(NamedTuple):
    """Sides of the tiles that one program works on, and how it does: Triton's names, as the kernels are given them."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    PRECISION: str
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def _blocks(table: Tensor, summed: int) -> _Blocks:
    """For a product that sums over `summed` numbers, 16 or more of which (a power of 2) are taken at a time.

    128 registers a thread and 96 KiB of shared memory let two programs share a processor: one multiplies while the
    other one takes exponentials. Exact float32 runs on the ordinary units, where larger tiles would spill.
    """
    if table.dtype != torch.float32:
        return _Blocks(128, 128, min(64, _power_of_2(summed)), "ieee", 8, 3, maxnreg=128)
    if (precision := _float32_precision()) == "ieee":
        return _Blocks(64, 64, 16, precision, 4, 2)
    return _Blocks(128, 128, min(32, _power_of_2(summed)), precision, 8, 3, maxnreg=128)


def _float32_precision() -> str:
    # Where torch has the newer setting, reading the older one may raise.
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)
    return "tf32" if newer == "tf32" or (newer is None and matmul.allow_tf32) else "ieee"


def _slabs(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of the slabs that cover all pairs; the weights of each fit the scratch."""
    numbers = SCRATCH // rows.element_size()
    wide = _fitting(len(columns), numbers // _rounded_up(min(len(rows), SLAB_ROWS)))
    tall = _fitting(len(rows), numbers // _rounded_up(wide))
    for i in range(0, len(rows), tall):
        for j in range(0, len(columns), wide):
            yield slice(i, min(i + tall, len(rows))), slice(j, min(j + wide, len(columns)))


def _fitting(length: int, most: int) -> int:
    """As much of a length, rounded up, as is at most `most`; one multiple at least."""
    return max(MULTIPLE, min(_rounded_up(length), most // MULTIPLE * MULTIPLE))


def _rounded_up(length: int) -> int:
    """The next multiple of every tile's sides, one at least."""
    return max(1, math.ceil(length / MULTIPLE)) * MULTIPLE


def _power_of_2(d: int) -> int:
    """The next one; the smallest side that the matrix units take is 16."""
    return max(16, 1 << (d - 1).bit_length())


def _base_2(lse: Tensor, grad: Tensor) -> Float[Tensor, "2 b"]:
    """(lse in base 2, gradient): what is paired with nothing gets +inf and 0, so that its weights are 0."""
    empty = lse == -torch.inf
    base_2 = (lse.float() * math.log2(math.e)).masked_fill(empty, torch.inf)
    return torch.stack([base_2, grad.float().masked_fill(empty, 0)])


def _gain(by_row: Tensor, by_column: Tensor | None) -> Float[Tensor, "1"]:
    """The power of 2 that brings gradients up to 2^14: a mean over rows makes them small, and float16 has no room."""
    given = by_row[1] if by_column is None else torch.cat([by_row[1], by_column[1]])
    peak = given.abs().amax(0, keepdim=True) if len(given) else given.new_ones(1)
    return torch.exp2(14 - peak.clamp_min(2.0**-100).log2().ceil())


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel, multiplications fused with additions: newer releases of Triton must be asked for it."""
    kernel[grid](*arguments, enable_fp_fusion=True, **settings)

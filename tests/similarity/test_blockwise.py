"""One pass over a table of similarities, both directions, against the dense formula; and how far the scales may lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvpretrain.similarity import blockwise
from mvpretrain.similarity.blockwise import PairMask
from tests.similarity.test_autograd import case, ids_of

SIZES = [(1, 1), (4, 5), (5, 4), (9, 11), (16, 6)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "ROWS", 4)
    monkeypatch.setattr(blockwise, "COLUMNS", 5)


def drawn(b: int, n: int, with_ids: bool, scale: float = 7.0, dtype=torch.float64):
    rows, columns, _, valid = case(b, n, dtype=dtype)
    row_valid = torch.rand(b, generator=torch.Generator().manual_seed(b)) < 0.8
    return (
        rows,
        columns,
        torch.tensor([scale], dtype=dtype),
        PairMask(row_valid, valid, *(ids_of(b, n) if with_ids else ())),
    )


def dense(rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask) -> Tensor:
    counts = mask.rows[:, None] & mask.columns
    if mask.row_ids is not None:
        counts = counts & (mask.row_ids[:, None] != mask.column_ids)
    return (scale * rows @ columns.T).masked_fill(~counts, -torch.inf)


@pytest.mark.parametrize("scale", [7.0, 300.0], ids=["near", "far"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("b", "n"), SIZES)
def test_sums_are_those_of_the_dense_table(b, n, with_ids, scale):
    """300: similarities so far apart that one exponential cannot serve rows and columns."""
    rows, columns, factor, mask = drawn(b, n, with_ids, scale)
    by_row, by_column = blockwise.forward(rows, columns, factor, mask, both=True)
    whole = dense(rows, columns, factor, mask)
    assert by_column is not None
    for found, dim in ((by_row, 1), (by_column, 0)):
        torch.testing.assert_close(found.lse, whole.logsumexp(dim), rtol=1e-12, atol=1e-12)
        finite = found.lse > -torch.inf
        assert torch.equal(found.argmax[finite], whole.argmax(dim)[finite]) and not found.argmax[~finite].any()
    alone, none = blockwise.forward(rows, columns, factor, mask, both=False)
    torch.testing.assert_close(alone, by_row, rtol=1e-12, atol=1e-12)
    assert none is None


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("scale", [7.0, 300.0], ids=["near", "far"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("b", "n"), SIZES)
def test_gradient_is_that_of_the_dense_table(b, n, with_ids, scale, both):
    rows, columns, factor, mask = drawn(b, n, with_ids, scale)
    leaves = rows.requires_grad_(), columns.requires_grad_()
    whole = dense(*leaves, factor, mask)
    row_lse, column_lse = whole.logsumexp(1), whole.logsumexp(0)
    make = torch.Generator().manual_seed(3)
    row_grad, column_grad = (torch.randn(len(x), generator=make, dtype=x.dtype) for x in (row_lse, column_lse))
    value = (row_lse * row_grad)[row_lse > -torch.inf].sum()
    if both:
        value = value + (column_lse * column_grad)[column_lse > -torch.inf].sum()
    # Sums of nothing: autograd makes NaN of them, the closed form must not.
    wanted = [x.nan_to_num(0) for x in torch.autograd.grad(value, leaves)] if value.requires_grad else []
    if not torch.isfinite(whole).any():
        wanted = [torch.zeros_like(x) for x in leaves]
    rows, columns = rows.detach(), columns.detach()
    by_column = (column_lse.detach(), column_grad) if both else None
    found = blockwise.backward(rows, columns, factor, mask, (row_lse.detach(), row_grad), by_column)
    empty_rows, empty_columns = row_lse == -torch.inf, column_lse == -torch.inf
    wanted[0][empty_rows] = 0
    wanted[1][empty_columns] = 0
    torch.testing.assert_close([x * factor for x in found], wanted, rtol=1e-10, atol=1e-11)


def test_float32_at_scale_100_keeps_its_digits():
    rows, columns, scale, mask = drawn(16, 23, False, 100.0)
    rows, columns, scale = rows.float(), columns.float(), scale.float()
    wanted = blockwise.forward(rows.double(), columns.double(), scale.double(), mask, both=True)
    found = blockwise.forward(rows, columns, scale, mask, both=True)
    for one, other in zip(found, wanted):
        assert one is not None and other is not None
        torch.testing.assert_close(one.lse.double(), other.lse, rtol=3e-6, atol=1e-5)


def test_rows_of_an_absent_view_leave_no_trace():
    rows, columns, scale, mask = drawn(9, 11, False)
    rows[~mask.rows] = torch.nan_to_num(rows[~mask.rows]) + 5
    other = rows.clone()
    other[~mask.rows] = 0
    found, wanted = (blockwise.forward(r, columns, scale, mask, both=True)[1] for r in (rows, other))
    assert found is not None and wanted is not None
    torch.testing.assert_close(found.lse, wanted.lse, rtol=0, atol=0)


def counting_products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the tiles that are computed from now on."""
    counted, mm = [], torch.mm

    def counting(one: Tensor, other: Tensor, **more: Tensor) -> Tensor:
        counted.append((len(one), other.shape[1]))
        return mm(one, other, **more)

    monkeypatch.setattr(torch, "mm", counting)
    return counted


def check_both_directions(rows: Tensor, columns: Tensor, scale: Tensor, mask: PairMask) -> None:
    """Sums and gradient against the dense table, tiles computed again or cached."""
    cache = blockwise.TileCache()
    by_row, by_column = blockwise.forward(rows, columns, scale, mask, True, (cache, "name"))
    assert by_column is not None and cache.tiles
    make = torch.Generator().manual_seed(3)
    row_grad, column_grad = (torch.randn(len(x), generator=make, dtype=rows.dtype) for x in (rows, columns))
    given = rows, columns, scale, mask, (by_row.lse, row_grad), (by_column.lse, column_grad)
    kept = blockwise.backward(*given, (cache, "name"))
    assert not cache.tiles
    torch.testing.assert_close(kept, blockwise.backward(*given), rtol=0, atol=0)
    whole = dense(rows, columns, scale, mask)
    for found, dim in ((by_row, 1), (by_column, 0)):
        torch.testing.assert_close(found.lse, whole.logsumexp(dim), rtol=1e-12, atol=1e-12)
        finite = found.lse > -torch.inf
        assert torch.equal(found.argmax[finite], whole.argmax(dim)[finite]) and not found.argmax[~finite].any()
    weight = whole.softmax(1).nan_to_num(0) * row_grad[:, None] + whole.softmax(0).nan_to_num(0) * column_grad
    torch.testing.assert_close(kept, (weight @ columns, weight.T @ rows), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("with_ids", [False, True])
def test_tiles_in_which_nothing_counts_are_not_computed(monkeypatch, with_ids):
    """Some of the rows in both directions here, and some of the columns in one."""
    rows, columns, scale, mask = drawn(16, 23, with_ids)
    mask = mask._replace(rows=torch.arange(16) // 4 != 1, columns=torch.arange(23) // 5 % 4 != 1)
    tiles = [(i.start, j.start) for i, j, _ in blockwise.scaled_tiles(rows, columns, scale, mask)]
    assert tiles == [(i, j) for i in (0, 8, 12) for j in (0, 10, 15, 20)]
    counted = counting_products(monkeypatch)
    check_both_directions(rows, columns, scale, mask)
    assert counted == 2 * [(4, 5), (4, 5), (4, 5), (4, 3)] * 3  # the one backward of two that finds no tiles cached


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("few", "whole"), [((3, 0), 23), ((7, 8), 13), ((16, 2), 2)])
def test_where_few_count_they_are_worked_on_alone(monkeypatch, few, whole, with_ids):
    """Of 16 rows 3 and of 23 columns all; of both some; all rows and two columns."""
    rows, columns, scale, mask = drawn(16, 23, with_ids)
    count, begin = few
    mask = mask._replace(rows=(torch.arange(16) * 5 + begin) % 16 < count, columns=torch.arange(23) * 7 % 23 < whole)
    counted = counting_products(monkeypatch)
    check_both_directions(rows, columns, scale, mask)
    assert sum(b * n for b, n in counted) == 2 * count * whole


@pytest.mark.parametrize("none", ["rows", "columns"])
def test_nothing_at_all_counts(none):
    rows, columns, scale, mask = drawn(9, 11, False)
    mask = mask._replace(**{none: torch.zeros_like(getattr(mask, none))})
    for found in blockwise.forward(rows, columns, scale, mask, both=True):
        assert found is not None and bool((found.lse == -torch.inf).all()) and not found.argmax.any()
    row, column = ((torch.full((n,), -torch.inf, dtype=rows.dtype), torch.ones(n, dtype=rows.dtype)) for n in (9, 11))
    assert not any(x.any() for x in blockwise.backward(rows, columns, scale, mask, row, column))

"""Tiled log-sum-exp against loops in float64, its gradient against finite differences, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mvpretrain.similarity import autograd, blockwise


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "ROWS", 4)
    monkeypatch.setattr(blockwise, "COLUMNS", 5)


def case(b: int, n: int, d: int = 3, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, columns, scale, valid): unsorted, with about a third of the columns left out."""
    make = torch.Generator().manual_seed(seed + 100 * b + n)
    rows = normalize(torch.randn(b, d, generator=make, dtype=dtype), dim=1)
    columns = normalize(torch.randn(n, d, generator=make, dtype=dtype), dim=1)
    return rows, columns, torch.tensor([7.0], dtype=dtype), torch.rand(n, generator=make) < 0.7


def ids_of(b: int, n: int) -> tuple[Tensor, Tensor]:
    """Ids beyond float's integers, negative ones among them, each several times."""
    make = torch.Generator().manual_seed(b + n)
    names = torch.tensor([2**60, 2**60 + 1, -3, 0])
    return names[torch.randint(4, (b,), generator=make)], names[torch.randint(4, (n,), generator=make)]


def slow(rows, columns, scale, valid, exclude_same_id=None) -> tuple[list[float], list[int]]:
    """The definition, a number at a time."""
    sums, indices = [], []
    for i in range(len(rows)):
        terms = {
            j: float(scale) * sum(float(a) * float(b) for a, b in zip(rows[i], columns[j]))
            for j in range(len(columns))
            if valid[j] and (exclude_same_id is None or int(exclude_same_id[0][i]) != int(exclude_same_id[1][j]))
        }
        top = max(terms.values(), default=0.0)
        total = math.fsum(math.exp(t - top) for t in terms.values())
        sums.append(top + math.log(total) if terms else -math.inf)
        indices.append(max(terms, key=lambda j: terms[j]) if terms else 0)
    return sums, indices


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("n", [1, 4, 5, 6, 10, 11, 16])
@pytest.mark.parametrize("b", [1, 3, 4, 5, 8, 9])
def test_value_and_argmax_are_those_of_the_loop(small_tiles, b, n, with_ids):
    rows, columns, scale, valid = case(b, n)
    exclude_same_id = ids_of(b, n) if with_ids else None
    found, argmax = autograd.logsumexp(rows, columns, scale, valid, exclude_same_id)
    sums, indices = slow(rows, columns, scale, valid, exclude_same_id)
    torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert argmax.tolist() == indices


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("b", "n"), [(4, 5), (5, 6), (9, 11)])
def test_gradient_is_that_of_finite_differences(small_tiles, b, n, with_ids):
    rows, columns, scale, valid = case(b, n)
    valid[0] = True
    # Row 0 keeps a column, so that every value is finite; rows without any are tested below.
    exclude_same_id = (torch.arange(b), torch.arange(n) + 1) if with_ids else None
    inputs = rows.requires_grad_(), columns.requires_grad_(), scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c, s: autograd.logsumexp(r, c, s, valid, exclude_same_id)[0], inputs)


@pytest.mark.parametrize("default_tiles", [False, True])
def test_gradient_is_that_of_autograd(default_tiles, monkeypatch):
    if not default_tiles:
        monkeypatch.setattr(blockwise, "ROWS", 7)
        monkeypatch.setattr(blockwise, "COLUMNS", 3)
    rows, columns, scale, valid = case(20, 17)
    exclude_same_id = ids_of(20, 17)
    weight = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = rows.requires_grad_(), columns.requires_grad_(), scale.requires_grad_()
    found = torch.autograd.grad((autograd.logsumexp(*inputs, valid, exclude_same_id)[0] * weight).sum(), inputs)
    whole = (scale * rows @ columns.T).masked_fill(
        ~valid | (exclude_same_id[0][:, None] == exclude_same_id[1]), -torch.inf
    )
    wanted = torch.autograd.grad((whole.logsumexp(1) * weight).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_rows_without_columns_are_minus_infinity_and_have_no_gradient(small_tiles):
    rows, columns, scale, valid = case(6, 11)
    valid[:] = True
    own = torch.tensor([1, 2, 1, 2, 1, 2])
    inputs = rows.requires_grad_(), columns.requires_grad_(), scale.requires_grad_()
    found, argmax = autograd.logsumexp(*inputs, valid, (own, torch.ones(11, dtype=torch.int64)))
    assert (found == -torch.inf).tolist() == (own == 1).tolist()
    assert argmax[own == 1].tolist() == [0, 0, 0]
    # Gradients that reach such rows are dropped, even those that an outer logaddexp turns into NaN.
    gradients = torch.autograd.grad(torch.logaddexp(found, found).nan_to_num(neginf=0).sum(), inputs)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][own == 1] == 0).all() and (gradients[0][own == 2] != 0).any()
    nothing = autograd.logsumexp(*inputs, torch.zeros(11, dtype=torch.bool))[0]
    assert (nothing == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), inputs))


def test_no_rows_and_no_columns():
    rows, columns, scale, valid = case(3, 4)
    assert autograd.logsumexp(rows[:0], columns, scale, valid)[0].shape == (0,)
    assert autograd.logsumexp(rows, columns[:0], scale, valid[:0])[0].tolist() == [-math.inf] * 3


def test_identical_rows_at_scale_100_stay_finite(small_tiles):
    rows = normalize(torch.ones(9, 8), dim=1).requires_grad_()
    scale = torch.tensor([100.0], requires_grad=True)
    found, _ = autograd.logsumexp(rows, rows, scale, torch.ones(9, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((9,), 100 + math.log(9)), rtol=1e-6, atol=1e-5)
    for gradient in torch.autograd.grad(found.sum(), [rows, scale]):
        assert gradient.isfinite().all()
    # Far apart as well: the largest and the smallest similarity differ by exp(200).
    found, _ = autograd.logsumexp(rows, torch.cat([-rows, rows[:1]]), scale, torch.ones(10, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((9,), 100.0), rtol=1e-6, atol=1e-5)


def test_rows_that_came_from_bfloat16(small_tiles):
    rows, columns, scale, valid = case(9, 11, d=16, dtype=torch.float32)
    rows, columns, scale = rows.bfloat16().float(), columns.bfloat16().float(), scale * 14
    found, argmax = autograd.logsumexp(rows, columns, scale, valid)
    sums, indices = slow(rows, columns, scale, valid)
    torch.testing.assert_close(found, torch.tensor(sums), rtol=1e-5, atol=1e-4)
    assert argmax.tolist() == indices


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_memory_is_the_tables_and_one_tile(monkeypatch):
    monkeypatch.setattr(blockwise, "ROWS", 16)
    monkeypatch.setattr(blockwise, "COLUMNS", 32)
    rows, columns, scale, valid = case(200, 300)
    ids = torch.arange(200), torch.arange(300)
    with Largest() as seen:
        x = rows.requires_grad_(), columns.requires_grad_(), scale.requires_grad_()
        autograd.logsumexp(*x, valid, ids)[0].sum().backward()
    assert 16 * 32 <= seen.elements <= 300 * 3
    with Largest() as seen:
        _ = rows @ columns.T
    assert seen.elements == 200 * 300


def test_shapes_are_checked():
    rows, columns, scale, valid = case(3, 4)
    with pytest.raises(TypeCheckError):
        autograd.logsumexp(rows, columns[:, :2], scale, valid)
    with pytest.raises(TypeCheckError):
        autograd.logsumexp(rows, columns, scale, valid[:3])


@pytest.mark.parametrize(("b", "n"), [(1, 1), (4, 5), (9, 11)])
def test_softplus_sum_is_that_of_the_loop_and_its_gradient(small_tiles, b, n):
    rows, columns, scale, valid = case(b, n)
    bias = torch.tensor([-2.5], dtype=torch.float64)
    found = autograd.softplus_sum(rows, columns, scale, bias, valid)
    for i in range(b):
        terms = [math.log1p(math.exp(float(scale * (rows[i] @ columns[j]) + bias))) for j in range(n) if valid[j]]
        assert float(found[i]) == pytest.approx(math.fsum(terms), rel=1e-12, abs=1e-14)
    inputs = [x.requires_grad_() for x in (rows, columns, scale, bias)]
    assert torch.autograd.gradcheck(lambda r, c, s, o: autograd.softplus_sum(r, c, s, o, valid), inputs)


def distance(rows, columns, shared):
    """A score that is no scaled product: minus the squared distance, weighted by the row, plus a column's own bonus."""
    (r, weight), (c, bonus), (scale,) = rows, columns, shared
    return bonus - scale * weight[:, None] * (r[:, None] - c[None]).square().sum(dim=2)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("b", "n"), [(1, 1), (4, 5), (5, 6), (9, 11)])
def test_logsumexp_of_any_score(small_tiles, b, n, with_ids):
    rows, columns, scale, valid = case(b, n)
    valid[0] = True
    exclude_same_id = ids_of(b, n) if with_ids else None
    make = torch.Generator().manual_seed(b)
    weight, bonus = (torch.rand(m, generator=make, dtype=torch.float64) for m in (b, n))
    inputs = [x.requires_grad_() for x in (rows, weight, columns, bonus, scale)]

    def found(r, w, c, o, s):
        return autograd.logsumexp_of_score(distance, (r, w), (c, o), (s,), valid, exclude_same_id)

    gone = ~valid[None] if exclude_same_id is None else ~valid | (exclude_same_id[0][:, None] == exclude_same_id[1])
    whole = distance((rows, weight), (columns, bonus), (scale,)).masked_fill(gone, -torch.inf)
    lse, argmax = found(*inputs)
    finite = lse > -torch.inf
    torch.testing.assert_close(lse, whole.logsumexp(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(argmax[finite], whole.argmax(1)[finite])
    factor = torch.randn(b, generator=make, dtype=torch.float64)
    if finite.any():
        wanted = torch.autograd.grad((whole[finite].logsumexp(1) * factor[finite]).sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad((lse * factor)[finite].sum(), inputs), wanted)


def test_logsumexp_of_what_needs_no_gradient(small_tiles):
    rows, columns, scale, valid = case(9, 11)
    weight, bonus = torch.ones(9, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    columns.requires_grad_()
    lse, _ = autograd.logsumexp_of_score(distance, (rows, weight), (columns, bonus), (scale,), valid)
    lse.sum().backward()
    assert columns.grad is not None and columns.grad.abs().sum() > 0 and weight.grad is None

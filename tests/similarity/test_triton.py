"""The Triton kernels against the dense formula in float64: by Triton's interpreter everywhere, and on a GPU.

The interpreter replaces triton.language when it is imported, so it lives in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.similarity import blockwise, triton
from tests.ranks import pool_of
from tests.similarity.offline import Compiled, compile_only, interpret

Run = Callable[..., Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2**-8, FP16: 2**-11, FP32: 0.0}  # of a weight, as the module's docstring says

without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Problem(NamedTuple):
    """The first arguments of forward and backward, in their order."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    row_valid: Tensor
    column_valid: Tensor
    row_ids: Tensor | None
    column_ids: Tensor | None

    def to(self, device: str) -> Problem:
        moved: list[Any] = [x if x is None else x.to(device) for x in self]
        return Problem(*moved)

    def dense(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scaled similarities, far below all others where a pair does not count: finite, so that autograd is exact."""
        counts = self.row_valid[:, None] & self.column_valid
        if self.row_ids is not None and self.column_ids is not None:
            counts = counts & (self.row_ids[:, None] != self.column_ids)
        return (self.scale.double() * (rows @ columns.T)).masked_fill(~counts, -1e6)


def drawn(b: int, n: int, d: int, dtype: torch.dtype = FP32, scale: float = 20.0, with_ids: bool = False) -> Problem:
    """Unsorted unit rows, about a fifth of rows and columns not valid, ids beyond float's integers, several times."""
    make = torch.Generator().manual_seed(b + 10 * n + 100 * d)
    rows, columns = (normalize(torch.randn(m, d, generator=make), dim=1).to(dtype) for m in (b, n))
    valid = (torch.rand(m, generator=make) < 0.8 for m in (b, n))
    names = torch.tensor([2**60, 2**60 + 1, -3, 0])
    ids = [names[torch.randint(4, (m,), generator=make)] if with_ids else None for m in (b, n)]
    return Problem(rows, columns, torch.tensor([scale]), *valid, *ids)


def check_sums(problem: Problem, both: bool = True) -> tuple[Tensor, Tensor | None]:
    """Compare forward with the dense formula, both directions; gives the sums found."""
    whole = problem.dense(problem.rows.double(), problem.columns.double())
    row_lse, row_best, column_lse, column_best = triton.forward(*problem, both=both)
    found = {1: (row_lse, row_best)}
    if both:
        assert column_lse is not None and column_best is not None
        found[0] = column_lse, column_best
    else:
        assert column_lse is None and column_best is None
    for dim, (lse, argmax) in found.items():
        empty = (whole == -1e6).all(dim)
        assert torch.equal(lse == -torch.inf, empty) and not argmax[empty].any()
        assert lse.dtype == FP32 and argmax.dtype == torch.int64
        wanted, top = whole.logsumexp(dim), whole.amax(dim)
        torch.testing.assert_close(lse[~empty].double(), wanted[~empty], rtol=2e-7, atol=4e-6)
        reached = whole.gather(dim, argmax.unsqueeze(dim)).squeeze(dim)
        assert (top - reached)[~empty].le(1e-6 * float(problem.scale)).all()
    return row_lse, column_lse


def check_gradient(problem: Problem, row_lse: Tensor, column_lse: Tensor | None) -> None:
    """Compare backward with autograd through the dense formula, within the documented rounding of the weights."""
    make = torch.Generator().manual_seed(7)
    device, sizes = problem.rows.device, (len(problem.rows), len(problem.columns))
    row_grad, column_grad = (torch.randn(m, 2, generator=make).to(device)[:, 0] / m for m in sizes)
    to_column = None if column_lse is None else column_grad
    found = triton.backward(*problem, row_lse, column_lse, row_grad, to_column)
    leaves = [x.double().requires_grad_() for x in (problem.rows, problem.columns)]
    whole = problem.dense(*leaves)
    g, h = (x.double().masked_fill((whole == -1e6).all(dim), 0) for x, dim in ((row_grad, 1), (column_grad, 0)))
    value = whole.logsumexp(1) @ g
    weight = whole.softmax(1) * g.abs()[:, None]
    if column_lse is not None:
        value = value + whole.logsumexp(0) @ h
        weight = weight + whole.softmax(0) * h.abs()
    wanted = torch.autograd.grad(value, leaves)
    most = weight @ problem.columns.double().abs(), weight.T @ problem.rows.double().abs()
    # 1e-5: of an exponent of 100, float32 keeps five decimals.
    share = ROUNDING[problem.rows.dtype] + 1e-7 + 1e-7 * float(problem.scale)
    for one, other, size in zip(found, wanted, most):
        assert one.dtype == FP32
        off = (one.double() - other / problem.scale.double()).abs()
        assert (off <= share * size.detach() + 1e-10).all(), float((off / (size.detach() + 1e-10)).max())


def check(rank: int, sizes: tuple[int, int, int], dtype: torch.dtype, scale: float, ids: bool, both=True) -> None:
    problem = drawn(*sizes, dtype, scale, ids)
    check_gradient(problem, *check_sums(problem, both))


@pytest.fixture(scope="module")
def interpreted(pytestconfig: pytest.Config) -> Iterator[Run]:
    pool = pool_of(1, pytestconfig.getini("filterwarnings"))
    pool.run(interpret)
    yield lambda fn, *args: pool.run(fn, *args)[0]
    pool.close()


@without_triton
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("sizes", [(70, 131, 1), (1, 1, 8), (131, 70, 33), (3, 140, 64), (66, 5, 100)], ids=str)
def test_sums_and_gradient(interpreted: Run, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreted(check, sizes, dtype, 20.0, sizes[2] in (1, 64))


@without_triton
@pytest.mark.parametrize(("sizes", "dtype"), [((9, 67, 256), BF16), ((65, 7, 300), FP32), ((6, 130, 300), FP16)])
def test_long_rows_far_apart(interpreted: Run, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreted(check, sizes, dtype, 100.0, True)


@without_triton
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_rows_alone(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(check, (66, 70, 20), dtype, 20.0, True, False)


def in_slabs(rank: int, dtype: torch.dtype) -> None:
    before = triton.SCRATCH, triton.SLAB_ROWS, triton.PROGRAMS
    try:
        triton.SCRATCH, triton.SLAB_ROWS, triton.PROGRAMS = 128 * 128 * dtype.itemsize, 128, 6
        problem = drawn(140, 260, 20, dtype)
        assert len(list(triton._slabs(problem.rows, problem.columns))) == 6
        assert len(triton._Gradient.of(problem.rows).parts) > 1
        check_gradient(problem, *check_sums(problem))
    finally:
        triton.SCRATCH, triton.SLAB_ROWS, triton.PROGRAMS = before


@without_triton
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_many_slabs_and_parts(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(in_slabs, dtype)


def where_few_count(rank: int) -> None:
    """A tenth of the rows: the kernels are given those, and what comes back is as from the ordinary tiles."""
    rows, columns, scale, _, valid, *ids = drawn(70, 131, 20, with_ids=True)
    mask = blockwise.PairMask(torch.arange(70) % 10 == 3, valid, *ids)
    make = torch.Generator().manual_seed(7)
    row_grad, column_grad = (torch.randn(n, generator=make) for n in (70, 131))
    found, kernels, given = [], triton.forward, []
    on_gpu = blockwise._on_gpu
    try:
        triton.forward = lambda *args, **more: given.append(len(args[0])) or kernels(*args, **more)
        for chosen in (False, True):
            blockwise._on_gpu = lambda *tables, chosen=chosen: chosen
            row, column = blockwise.forward(rows, columns, scale, mask, both=True)
            assert column is not None
            sums = (row.lse, row_grad), (column.lse, column_grad)
            found.append((row, column, blockwise.backward(rows, columns, scale, mask, *sums)))
    finally:
        triton.forward, blockwise._on_gpu = kernels, on_gpu
    assert given == [7]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@without_triton
def test_rows_that_count_alone(interpreted: Run) -> None:
    interpreted(where_few_count)


def nothing_counts(rank: int) -> None:
    problem = drawn(5, 70, 4)
    for gone in (
        problem._replace(row_valid=torch.zeros(5, dtype=torch.bool)),
        problem._replace(column_valid=torch.zeros(70, dtype=torch.bool)),
        problem._replace(row_ids=torch.full((5,), 2**60), column_ids=torch.full((70,), 2**60)),
    ):
        row_lse, column_lse = check_sums(gone)
        found = triton.backward(*gone, row_lse, column_lse, torch.ones(5), torch.full((70,), torch.nan))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in found)
    for b, n in ((0, 3), (3, 0), (0, 0)):
        none = drawn(b, n, 4)
        row_lse, row_best, column_lse, column_best = triton.forward(*none)
        assert column_lse is not None and column_best is not None
        assert row_lse.tolist() == [-torch.inf] * b and column_lse.tolist() == [-torch.inf] * n
        assert not row_best.any() and not column_best.any()
        found = triton.backward(*none, row_lse, column_lse, torch.ones(b), torch.ones(n))
        assert [x.tolist() for x in found] == [[[0.0] * 4] * b, [[0.0] * 4] * n]


@without_triton
def test_where_nothing_counts(interpreted: Run) -> None:
    interpreted(nothing_counts)


def sum_of_nothing(rank: int) -> None:
    """A sum of -inf has no gradient, even where its exponentials would be beyond float32."""
    problem = drawn(5, 70, 4, scale=400.0)
    row_lse, _, _, _ = triton.forward(*problem, both=False)
    without, _ = triton.backward(*problem, row_lse, None, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), None)
    row_lse[2] = -torch.inf
    found, _ = triton.backward(*problem, row_lse, None, torch.ones(5), None)
    assert problem.row_valid[2] and torch.equal(found, without) and not found[2].any()


@without_triton
def test_a_sum_of_nothing_has_no_gradient(interpreted: Run) -> None:
    interpreted(sum_of_nothing)


def draws(rank: int) -> None:
    row = normalize(torch.ones(1, 9), dim=1)
    gathered = torch.ones(70, dtype=torch.bool), torch.arange(200) >= 3
    row_lse, row_best, column_lse, column_best = triton.forward(
        row.expand(70, 9), row.expand(200, 9), torch.tensor([100.0]), *gathered
    )
    torch.testing.assert_close(row_lse, torch.full((70,), 197.0).log() + 100, rtol=1e-6, atol=0)
    assert column_lse is not None and column_best is not None
    torch.testing.assert_close(column_lse[3:], torch.full((197,), 70.0).log() + 100, rtol=1e-6, atol=0)
    assert (row_best == 3).all() and not column_best.any()


@without_triton
def test_the_first_of_equal_terms_is_best(interpreted: Run) -> None:
    interpreted(draws)


def shares(rank: int) -> None:
    """The gradient of one rank's rows, with sums over those of two, is its share of the whole one."""
    whole = drawn(40, 30, 5)
    row_lse, _, column_lse, _ = triton.forward(*whole)
    assert column_lse is not None
    row_grad, column_grad = torch.randn(40) / 40, torch.randn(30) / 30
    to_rows, to_columns = triton.backward(*whole, row_lse, column_lse, row_grad, column_grad)
    halves = []
    for at in (slice(0, 16), slice(16, 40)):
        half = whole._replace(rows=whole.rows[at], row_valid=whole.row_valid[at])
        halves.append(triton.backward(*half, row_lse[at], column_lse, row_grad[at], column_grad))
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), to_rows)
    torch.testing.assert_close(halves[0][1] + halves[1][1], to_columns)


@without_triton
def test_sums_over_more_than_these_rows(interpreted: Run) -> None:
    interpreted(shares)


def small_gradients(rank: int, dtype: torch.dtype) -> None:
    """A mean over a billion rows: float16 has no number that small."""
    problem = drawn(9, 40, 12, dtype)
    row_lse, _, _, _ = triton.forward(*problem, both=False)
    one, other = (triton.backward(*problem, row_lse, None, torch.full((9,), g), None) for g in (2.0**-30, 1.0))
    for small, large in zip(one, other):
        assert large.abs().max() > 0 and torch.equal(small * 2**30, large)


@without_triton
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_small_gradients_keep_their_digits(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(small_gradients, dtype)


def test_tables_of_a_cpu_are_not_taken() -> None:
    assert not triton.usable(torch.ones(2, 3), torch.ones(4, 3))


def compiled(rank: int, capability: int, cache: str) -> dict[str, Compiled]:
    found = compile_only(capability, cache)
    problem = drawn(2, 3, 512, BF16)
    row_lse, _, column_lse, _ = triton.forward(*problem)
    triton.backward(*problem, row_lse, column_lse, torch.ones(2), torch.ones(3))
    return found


@without_triton
def test_kernels_compile_for_hopper(pytestconfig: pytest.Config, tmp_path: Any) -> None:
    pool = pool_of(1, pytestconfig.getini("filterwarnings"))
    try:
        found = pool.run(compiled, 90, str(tmp_path))[0]
    finally:
        pool.close()
    assert set(found) == {"statistics", "merge", "gradient_weights", "product"}
    blockwise = {"statistics", "gradient_weights", "product"}
    assert {name for name, kernel in found.items() if "wgmma" in kernel.assembly} == blockwise
    # A processor has 228 KiB: two programs of the first two kernels shall share it, one of the last one.
    assert max(found["statistics"].shared, found["gradient_weights"].shared) <= 112 * 1024
    assert found["product"].shared <= 227 * 1024
    assert not any("atom" in kernel.assembly for kernel in found.values())


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1000, 3000, 512), (3001, 517, 300), (257, 4099, 1024), (16, 300_000, 33)], ids=str
)
def test_on_a_gpu(sizes: tuple[int, int, int], both: bool, dtype: torch.dtype) -> None:
    problem = drawn(*sizes, dtype, 100.0, sizes[0] == 1000).to("cuda")
    assert triton.usable(problem.rows, problem.columns)
    check_gradient(problem, *check_sums(problem, both))


@pytest.mark.gpu
@without_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_gpu_gives_equal_bits_twice(dtype: torch.dtype) -> None:
    problem = drawn(9000, 10_000, 128, dtype).to("cuda")
    sums = [triton.forward(*problem) for _ in range(2)]
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(*sums))
    grads = torch.ones(9000, device="cuda") / 9000, torch.ones(10_000, device="cuda") / 10_000
    found = [triton.backward(*problem, sums[0][0], sums[0][2], *grads) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*found))

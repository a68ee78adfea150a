"""Log-sum-exps at a temperature of each pair's own, against dense tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.similarity import autograd, blockwise, per_pair
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.per_pair import PairTemperature
from mvpretrain.testing.tables import draw

LAWS = [PairTemperature(0.1, 0.9), PairTemperature(0.3, 2.0, log_weight=0.4, inverse_weight=0.7)]


def problem(b: int, n: int, valid: float) -> tuple[list[Tensor], PairMask]:
    make = torch.Generator().manual_seed(b)
    row_ids, column_ids = (torch.randint(4, (m,), generator=make) for m in (b, n))
    rows, columns = (torch.rand(m, generator=make) < valid for m in (b, n))
    tensors = [normalize(draw(1, b, 5), dim=1), normalize(draw(2, n, 5), dim=1), draw(3, b, 3), draw(4, n, 3)]
    return [x.requires_grad_() for x in tensors], PairMask(rows, columns, row_ids, column_ids)


def dense(tensors: list[Tensor], law: PairTemperature, mask: PairMask) -> Tensor:
    rows, columns, row_codes, column_codes = tensors
    tau = law.low + (law.up - law.low) / (1 + torch.exp(row_codes @ column_codes.T))
    term = rows @ columns.T / tau - law.log_weight * torch.log(tau) - law.inverse_weight / tau
    assert mask.row_ids is not None and mask.column_ids is not None
    counts = mask.rows[:, None] & mask.columns & (mask.row_ids[:, None] != mask.column_ids)
    return term.masked_fill(~counts, -torch.inf)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("tile", [(512, 1024), (3, 4), (1, 1)])
@pytest.mark.parametrize("valid", [1.0, 0.7, 0.3, 0.0])  # the latter two compact the tables
def test_value_argmax_and_gradients_are_those_of_the_dense_table(monkeypatch, law, tile, valid):
    monkeypatch.setattr(blockwise, "ROWS", tile[0])
    monkeypatch.setattr(blockwise, "COLUMNS", tile[1])
    tensors, mask = problem(11, 17, valid)
    lse, argmax = per_pair.logsumexp(*tensors, temperature=law, mask=mask)
    terms = dense(tensors, law, mask)
    counts = terms.amax(dim=1) > -torch.inf
    torch.testing.assert_close(lse, terms.logsumexp(dim=1), rtol=1e-12, atol=1e-12)
    assert torch.equal(argmax, terms.argmax(dim=1).masked_fill(~counts, 0))
    if not counts.any():
        return
    factor = draw(9, 11)[counts]
    wanted = torch.autograd.grad((terms[counts].logsumexp(dim=1) * factor).sum(), tensors)
    found = torch.autograd.grad((lse[counts] * factor).sum(), tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    tensors, mask = problem(6, 7, 1.0)
    mask = mask._replace(row_ids=torch.arange(6))
    assert torch.autograd.gradcheck(lambda *x: per_pair.logsumexp(*x, temperature=LAWS[1], mask=mask)[0], tensors)


def test_equal_bounds_are_one_temperature():
    """Whatever the codes are; what a temperature costs is then a constant."""
    (rows, columns, *codes), mask = problem(11, 17, 1.0)
    law = PairTemperature(0.2, 0.2, 0.5, 0.1)
    found, _ = per_pair.logsumexp(rows, columns, *codes, temperature=law, mask=mask)
    assert mask.row_ids is not None and mask.column_ids is not None
    scale, ids = torch.tensor([5.0], dtype=torch.float64), (mask.row_ids, mask.column_ids)
    wanted, _ = autograd.logsumexp(rows, columns, scale, mask.columns, ids)
    torch.testing.assert_close(found, wanted - 0.5 * torch.log(torch.tensor(0.2)).double() - 0.5)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_sharp_temperatures_and_large_codes_stay_finite_in_float32(size):
    tensors, mask = problem(9, 9, 1.0)
    tensors = [(x.detach() * (1 if i < 2 else size)).float().requires_grad_() for i, x in enumerate(tensors)]
    law = PairTemperature(1e-5, 2.0, 64e-4, 1e-4)
    lse, _ = per_pair.logsumexp(*tensors, temperature=law, mask=mask)
    assert lse.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(lse.sum(), tensors))

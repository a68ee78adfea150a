"""The hardest candidates of each head, against a dense search."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.similarity import top_k as module
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.top_k import top_k
from mvpretrain.testing.tables import draw


def problem(b: int, n: int) -> tuple[torch.Tensor, torch.Tensor, PairMask]:
    make = torch.Generator().manual_seed(0)
    row_ids, column_ids = (torch.randint(4, (m,), generator=make) for m in (b, n))
    rows, columns = (torch.rand(m, generator=make) > 0.3 for m in (b, n))
    return draw(1, b, 3, 5), draw(2, n, 3, 5), PairMask(rows, columns, row_ids, column_ids)


@pytest.mark.parametrize("tile", [(512, 1024), (3, 4), (1, 1), (7, 2)])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_is_that_of_a_dense_search(monkeypatch, tile, k):
    monkeypatch.setattr(module, "ROWS", tile[0])
    monkeypatch.setattr(module, "COLUMNS", tile[1])
    rows, columns, mask = problem(11, 17)
    found = top_k(rows, columns, k, mask)
    dense = torch.einsum("ihd,jhd->ihj", rows, columns)
    assert mask.row_ids is not None and mask.column_ids is not None
    out = ~mask.rows[:, None] | ~mask.columns | (mask.row_ids[:, None] == mask.column_ids)
    dense = dense.masked_fill(out[:, None], -torch.inf)
    wanted = dense.topk(min(k, 17), dim=2)
    torch.testing.assert_close(found.similarity[:, :, :17], wanted.values)
    assert (found.similarity[:, :, 17:] == -torch.inf).all()
    real = found.similarity > -torch.inf
    torch.testing.assert_close(dense.gather(2, found.column)[real], found.similarity[real])
    torch.testing.assert_close(found.mean, dense.mean(dim=1).amax(dim=1))


def test_without_ids_all_valid_columns_count_and_none_is_taken_twice():
    rows, columns, mask = problem(4, 6)
    found = top_k(rows, columns, 6, PairMask(torch.ones_like(mask.rows), torch.ones_like(mask.columns)))
    assert (found.column.sort(dim=2).values == torch.arange(6)).all()
    assert not top_k(rows.requires_grad_(), columns, 2, mask).similarity.requires_grad

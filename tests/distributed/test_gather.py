"""Means over the gathered batch as sums over each rank's rows: their average over ranks is the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvpretrain.distributed.gather import BatchMean
from mvpretrain.testing.tables import draw, table
from mvpretrain.types import Embeddings

VALID = torch.arange(12) % 5 != 3


def parts(ranks: int) -> list[tuple[Embeddings, Tensor, Tensor]]:
    """(local table, values, which count) of each rank."""
    whole, values = table(2), draw(3, 12)
    rows = [slice(12 // ranks * r, 12 // ranks * (r + 1)) for r in range(ranks)]
    return [(whole.rows(at), values[at], VALID[at]) for at in rows]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_average_over_ranks_is_the_mean_over_all_rows_that_count(ranks):
    whole, values = table(2), draw(3, 12)
    for mean_of in (
        lambda local: BatchMean.over(VALID.sum(), local, whole),
        lambda local: BatchMean.over(torch.stack([VALID[:5].sum(), VALID[5:].sum()]), local, whole),
        lambda local: BatchMean.over(int(VALID.sum()), local, whole),
    ):
        found = [mean_of(local)(own, valid) for local, own, valid in parts(ranks)]
        torch.testing.assert_close(torch.stack(found).mean(), values[VALID].mean(), rtol=1e-14, atol=0)


def test_mean_over_no_rows_is_zero():
    whole = table(2)
    local, nothing = whole.rows(slice(0, 4)), torch.zeros(4, dtype=torch.bool)
    for mean in (
        BatchMean.over(torch.zeros(2, dtype=torch.int64), local, whole),
        BatchMean.over(0, local, whole),
    ):
        assert float(mean(torch.full((4,), torch.inf), nothing)) == 0 and float(mean.divisor(torch.float32)) > 0


def test_divisors_are_rounded_in_the_type_of_what_they_divide():
    whole = table(2)
    local = whole.rows(slice(0, 4))  # a third: 7 / 3 is no float32
    for count in (7, torch.tensor(7)):
        mean = BatchMean.over(count, local, whole)
        assert float(mean.divisor(torch.float64)) == 7 * 4 / 12
        assert float(mean(torch.ones(4, dtype=torch.float64))) == 4 / (7 * 4 / 12)
        assert mean(torch.ones(4)).dtype == torch.float32

"""Sums by key and means over other views, against loops."""

from __future__ import annotations

import torch

from mvpretrain.similarity.groups import count_by_key, mean_of_others, sum_by_key
from mvpretrain.testing.tables import ROWS, draw, names, table

KEYS = torch.tensor([7, -3, 2**60, 7, 5, -3, 7])


def test_sums_and_counts_by_key_are_those_of_a_loop():
    rows, valid = draw(1, 7, 4).requires_grad_(), torch.tensor([True, False, True, True, False, True, True])
    asked = torch.tensor([-3, 7, 7, 5, 2**60])
    wanted = torch.stack([sum(rows[j] for j in range(7) if KEYS[j] == a) for a in asked])  # type: ignore[misc]
    found = sum_by_key(KEYS, rows, asked)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    weights = draw(2, 5, 4)
    gradients = [torch.autograd.grad((x * weights).sum(), rows, retain_graph=True) for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=0)
    assert count_by_key(KEYS, valid, asked).tolist() == [1, 3, 3, 0, 1]
    assert count_by_key(KEYS, torch.zeros(7, dtype=torch.bool), asked).tolist() == [0] * 5


def test_means_of_others_are_those_of_a_loop():
    whole = table(3, dtype=torch.float64)
    present = whole.present | {"view1": torch.arange(ROWS) % 3 > 0}
    means, valid = mean_of_others(whole.z, present)
    for v in names(3):
        for i in range(ROWS):
            others = [whole.z[w][i] for w in names(3) if w != v and present[w][i]]
            wanted = torch.stack(others).mean(dim=0) if others else torch.zeros(8, dtype=torch.float64)
            assert bool(valid[v][i]) == bool(others)
            torch.testing.assert_close(means[v][i], wanted, rtol=1e-13, atol=1e-15)

"""Contractions against the dense tensor, in both arithmetics and in blocks of any size."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from mvpretrain.testing.tables import draw
from mvpretrain.transport.contraction import Arithmetic, Linear, Logarithmic, Network, Tables, blocks

SIZES = [(4, 5), (3, 5, 4), (4, 2, 5, 3), (2, 3, 4, 2, 3), (2, 3, 2, 2, 3, 2)]


def logs_of(sizes: tuple[int, ...]) -> tuple[Tables, list[Tensor]]:
    kernels = {(u, v): draw(10 * u + v, sizes[u], sizes[v]) for u, v in combinations(range(len(sizes)), 2)}
    return kernels, [draw(100 + u, n) for u, n in enumerate(sizes)]


def dense(logs: Tables, w: list[Tensor], without: tuple[int, ...] = ()) -> Tensor:
    """The whole tensor, from its definition; the scalings of some axes left out."""
    k = len(w)
    letters = "abcdef"[:k]
    given = [logs[u, v].exp() for u, v in combinations(range(k), 2)]
    given += [torch.ones_like(x) if u in without else x.exp() for u, x in enumerate(w)]
    names = [letters[u] + letters[v] for u, v in combinations(range(k), 2)] + list(letters)
    return torch.einsum(",".join(names) + "->" + letters, *given)


def onto(tensor: Tensor, u: int, v: int) -> Tensor:
    rest = [axis for axis in range(tensor.ndim) if axis not in (u, v)]
    return tensor.sum(rest) if rest else tensor


@pytest.mark.parametrize("arithmetic", [Linear(), Logarithmic()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contractions_are_sums_of_the_dense_tensor(sizes: tuple[int, ...], arithmetic: Arithmetic):
    logs, logs_w = logs_of(sizes)
    network = Network({pair: arithmetic.from_log(log) for pair, log in logs.items()}, arithmetic, 1)
    w, whole = [arithmetic.from_log(x) for x in logs_w], dense(logs, logs_w)
    for a, b in permutations(range(len(sizes)), 2):
        network.block = (7, 40, 10**6)[(a + b) % 3]  # below the size of a kernel too
        wanted = onto(dense(logs, logs_w, (a, b)), a, b)
        table = network.contract(w, a, b)
        found = arithmetic.to_plain(table)
        torch.testing.assert_close(found, wanted if a < b else wanted.T, rtol=1e-12, atol=0)
        pairs = network.pairs(w, a, b, table)
        for pair in combinations(range(len(sizes)), 2):
            torch.testing.assert_close(pairs[pair], onto(whole, *pair), rtol=1e-12, atol=0)


@pytest.mark.parametrize("most", [1, 3, 4, 12, 13, 100])
def test_blocks_fill_the_box_once(most):
    seen = torch.zeros(5, 3, 4)
    for block in blocks(seen.shape, most):
        assert 0 < seen[block].numel() <= most
        seen[block] += 1
    assert (seen == 1).all()
    assert list(blocks([0, 3], most)) == []

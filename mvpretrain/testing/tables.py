"""Tables of embeddings for checks: random ones with every complication, and their rows rank by rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.types import Embeddings

ROWS = 12
# Rows of each rank: none of them equal, and one rank with nothing.
SPLITS = {1: [12], 2: [9, 3], 3: [5, 1, 6], 4: [4, 0, 7, 1]}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def names(k: int) -> list[str]:
    return [f"view{v}" for v in range(k)]


def ids_and_presence(k: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Unsorted ids, three of them equal; the last view is missing from some rows, and so is the first."""
    ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)) + 2**60
    ids[7] = ids[2] = ids[11]
    present = {v: torch.ones(ROWS, dtype=torch.bool) for v in names(k)}
    present[names(k)[-1]][[0, 4, 7, 10]] = False
    present[names(k)[0]][[4, 6]] = False
    return ids, present


def table(k: int, seed: int = 0, dim: int = 8, dtype: torch.dtype = torch.float32, plain: bool = False) -> Embeddings:
    """Random unit rows; `plain`: all ids differ and nothing is missing."""
    ids, present = ids_and_presence(k, seed)
    if plain:
        ids, present = torch.arange(ROWS).flip(0), {v: torch.ones(ROWS, dtype=torch.bool) for v in present}
    z = {v: normalize(draw(100 * seed + i, ROWS, dim), dim=1).to(dtype) for i, v in enumerate(present)}
    return Embeddings(z, ids, present, torch.full((ROWS,), -1))


def labels_of(ids: Tensor) -> Tensor:
    """Two classes, and rows without a label; rows of one id have one label."""
    return torch.where(ids % 3 > 0, ids % 3, -1)


def part_of(whole: Embeddings, rank: int, size: int) -> Embeddings:
    start = sum(SPLITS[size][:rank])
    return whole.rows(slice(start, start + SPLITS[size][rank]))


def leaves(whole: Embeddings) -> Embeddings:
    """The same table; its rows collect gradients."""
    return whole._replace(z={v: z.detach().clone().requires_grad_() for v, z in whole.z.items()})

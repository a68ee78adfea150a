"""Sums of the rows that share a key, and the mean of a row's other views."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sum_by_key(keys: Int[Tensor, " n"], rows: Float[Tensor, "n d"], asked: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
    """For each key of `asked`, the sum of the rows that carry it; every one of them must be among `keys`."""
    unique, group = keys.unique(return_inverse=True)
    sums = rows.new_zeros(len(unique), rows.shape[1]).index_add(0, group, rows)
    return sums[torch.searchsorted(unique, asked)]


def count_by_key(keys: Int[Tensor, " n"], valid: Bool[Tensor, " n"], asked: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """For each key of `asked`, how many of the valid rows carry it."""
    carried = keys[valid].sort().values
    return torch.searchsorted(carried, asked, right=True) - torch.searchsorted(carried, asked)


def mean_of_others(
    rows: dict[str, Float[Tensor, "n d"]], present: dict[str, Bool[Tensor, " n"]]
) -> tuple[dict[str, Float[Tensor, "n d"]], dict[str, Bool[Tensor, " n"]]]:
    """For each view, the mean of each row's other present views, and where there is one; 0 where there is none."""
    held = {v: z * present[v].to(z.dtype)[:, None] for v, z in rows.items()}
    total, count = sum(held.values()), sum(p.int() for p in present.values())
    means, some = {}, {}
    for v in rows:
        others = count - present[v].int()
        means[v] = (total - held[v]) / others.clamp_min(1)[:, None]
        some[v] = others > 0
    return means, some

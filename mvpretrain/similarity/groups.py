"""Sums and means of the rows that share a key, and the mean of a row's other views."""

from __future__ import annotations

from typing import NamedTuple

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


class Groups(NamedTuple):
    """Rows by key: those of one key have one number."""

    of: Int[Tensor, " n"]
    number: int

    @classmethod
    def by(cls, keys: Int[Tensor, " n"]) -> Groups:
        unique, of = keys.unique(return_inverse=True)
        return cls(of, len(unique))

    def sum(self, rows: Float[Tensor, "m d"], of: slice, at: slice) -> Float[Tensor, "b d"]:
        """For each row number in `at`, the sum of `rows`, which are those numbered `of`, that have its key."""
        if self.number < len(self.of):
            return rows.new_zeros(self.number, rows.shape[1]).index_add_(0, self.of[of], rows)[self.of[at]]
        if of == at:
            return rows
        # No key comes twice: a row's key is its own, if anybody's.
        found = rows.new_zeros(at.stop - at.start, rows.shape[1])
        first, last = max(of.start, at.start), min(of.stop, at.stop)
        if first < last:
            found[first - at.start : last - at.start] = rows[first - of.start : last - of.start]
        return found


def mean_within(groups: Groups, values: Float[Tensor, "n m"], valid: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """For each row, the mean of all valid values in the rows of its key; NaN where there is none."""
    whole = slice(0, len(values))
    sums = groups.sum(torch.stack([values.masked_fill(~valid, 0).sum(1), valid.sum(1).to(values)], dim=1), whole, whole)
    return sums[:, 0] / sums[:, 1]


def log_mean_within(groups: Groups, logs: Float[Tensor, "n m"], valid: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """The logarithm of the mean of e^logs, as `mean_within`."""
    logs = logs.masked_fill(~valid, -torch.inf)
    top = logs.new_full((groups.number,), -torch.inf).scatter_reduce(0, groups.of, logs.amax(dim=1), "amax")[groups.of]
    safe = top.masked_fill(top == -torch.inf, 0)
    return mean_within(groups, (logs - safe[:, None]).exp(), valid).log() + safe


def classes(ids: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Each row's class: the label that a row of its id has, or else (-1) a number of the id's own."""
    groups = Groups.by(ids)
    label = labels.new_full((groups.number,), -1).scatter_reduce(0, groups.of, labels, "amax")
    own = labels.amax().clamp_min(-1) + 1 + torch.arange(groups.number, device=ids.device)
    return torch.where(label >= 0, label, own)[groups.of]


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

"""Rows that share a key (an id, a class): their sums, means and counts; and the mean of a row's other views."""

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
    """The rows of a table by key: those of one key are one group."""

    group_of_row: Int[Tensor, " n"]
    group_count: int

    @classmethod
    def by(cls, keys: Int[Tensor, " n"]) -> Groups:
        unique, group_of_row = keys.unique(return_inverse=True)
        return cls(group_of_row, len(unique))

    def sum(self, rows: Float[Tensor, "m d"], source: slice, target: slice) -> Float[Tensor, "b d"]:
        """For each row of the table in `target`, the sum of those of `rows` that are of its group.

        `rows` belong to the table's rows in `source`.
        """
        if self.group_count < len(self.group_of_row):
            sums = rows.new_zeros(self.group_count, rows.shape[1]).index_add_(0, self.group_of_row[source], rows)
            return sums[self.group_of_row[target]]
        if source == target:
            return rows
        # No key comes twice: a row's group is the row itself, where it is in `source` at all.
        sums = rows.new_zeros(target.stop - target.start, rows.shape[1])
        first, last = max(source.start, target.start), min(source.stop, target.stop)
        if first < last:
            sums[first - target.start : last - target.start] = rows[first - source.start : last - source.start]
        return sums


def group_mean(groups: Groups, values: Float[Tensor, "n m"], valid: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """For each row, the mean of all valid values in the rows of its group; NaN where there is none."""
    whole = slice(0, len(values))
    sums = groups.sum(torch.stack([values.masked_fill(~valid, 0).sum(1), valid.sum(1).to(values)], dim=1), whole, whole)
    return sums[:, 0] / sums[:, 1]


def group_log_mean(groups: Groups, logs: Float[Tensor, "n m"], valid: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """The logarithm of `group_mean` of e^logs, without overflow; NaN where there is none."""
    logs = logs.masked_fill(~valid, -torch.inf)
    top = logs.new_full((groups.group_count,), -torch.inf)
    top = top.scatter_reduce(0, groups.group_of_row, logs.amax(dim=1), "amax")[groups.group_of_row]
    safe = top.masked_fill(top == -torch.inf, 0)
    return group_mean(groups, (logs - safe[:, None]).exp(), valid).log() + safe


def classes(ids: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Each row's class: the label that a row of its id has, or else (-1) a number of the id's own."""
    groups = Groups.by(ids)
    label = labels.new_full((groups.group_count,), -1).scatter_reduce(0, groups.group_of_row, labels, "amax")
    own = labels.amax().clamp_min(-1) + 1 + torch.arange(groups.group_count, device=ids.device)
    return torch.where(label >= 0, label, own)[groups.group_of_row]


def mean_of_others(
    rows: dict[str, Float[Tensor, "n d"]], present: dict[str, Bool[Tensor, " n"]]
) -> tuple[dict[str, Float[Tensor, "n d"]], dict[str, Bool[Tensor, " n"]]]:
    """For each view, (the mean of each row's other present views, whether there is any); the mean is 0 where not."""
    held = {v: z * present[v].to(z.dtype)[:, None] for v, z in rows.items()}
    total, count = sum(held.values()), sum(p.int() for p in present.values())
    means, any_other = {}, {}
    for v in rows:
        others = count - present[v].int()
        means[v] = (total - held[v]) / others.clamp_min(1)[:, None]
        any_other[v] = others > 0
    return means, any_other

"""The rows of another view that carry an anchor's id: whether there are any, and their mean."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mvpretrain.similarity.groups import count_by_key, sum_by_key
from mvpretrain.types import Embeddings


def positive_mean(local: Embeddings, gathered: Embeddings, v: str) -> Float[Tensor, "b d"]:
    """For each local row, the mean of view v over the present rows of every rank that carry its id (0 where none)."""
    held = gathered.z[v] * gathered.present[v].to(gathered.z[v].dtype)[:, None]
    count = count_by_key(gathered.ids, gathered.present[v], local.ids)
    return sum_by_key(gathered.ids, held, local.ids) / count.clamp_min(1)[:, None]


def has_positive(table: Embeddings, gathered: Embeddings, u: str, v: str) -> Bool[Tensor, " b"]:
    """True for rows of `table` that have view u and, somewhere, a row of the same id that has view v."""
    return table.present[u] & torch.isin(table.ids, gathered.ids[gathered.present[v]])

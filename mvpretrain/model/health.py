"""How embeddings lie on the sphere: numbers that distinguish collapse from learning."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mvpretrain.types import Embeddings

HEALTH_ROWS = 256  # rows that the per-step health figures look at: enough for two digits, nothing in time


def uniformity(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """log mean exp(-2 ||x - y||^2) over pairs of different rows; 0 when collapsed, about -4 when spread.

    Wang & Isola, ICML 2020, eq. 2 (t = 2). Fewer than two rows: 0.
    """
    if len(z) < 2:
        return z.new_zeros(())
    squared = 2 - 2 * (z @ z.T)
    off = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-2 * squared[off]).logsumexp(0) - math.log(len(z) * (len(z) - 1))


def spread(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """sqrt(d) times the mean standard deviation of the coordinates: 1 for directions drawn uniformly, 0 collapsed."""
    if len(z) < 2:
        return z.new_zeros(())
    return z.std(dim=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def health(table: Embeddings) -> dict[str, Tensor]:
    """Uniformity and spread of each view's first rows on this rank: collapse shows here before it shows in the loss."""
    parts = {}
    for v, z in table.z.items():
        rows = z[:HEALTH_ROWS][table.present[v][:HEALTH_ROWS]]
        parts[f"uniformity/{v}"] = uniformity(rows)
        parts[f"spread/{v}"] = spread(rows)
    return parts

"""Correlations between the dimensions of two tables of the same rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

FLAT = 1e-5  # added to variances, as batch normalisation does


def correlations(a: Float[Tensor, "m d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """The correlation of each dimension of one view with each of the other, in [-1, 1]; 0 without rows."""
    return standardised(a).T @ standardised(b) / max(len(a), 1)


def standardised(z: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Columns of sqrt(d) z with mean 0 and variance 1, over m."""
    x = z.to(torch.promote_types(z.dtype, torch.float32)) * z.shape[1] ** 0.5
    rows = max(len(x), 1)
    centred = x - x.sum(dim=0) / rows
    return centred / (centred.square().sum(dim=0) / rows + FLAT).sqrt()


def off_diagonal(x: Float[Tensor, "h d d"]) -> Float[Tensor, "h m"]:
    """The numbers off the diagonal of each matrix."""
    return x[:, ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)]

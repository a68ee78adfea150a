"""PMRL: the views of a sample along one leading direction, different samples along different ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._tuples import complete, tuple_mean
from mvpretrain.similarity import autograd
from mvpretrain.types import Embeddings, Losses

FLAT = 1e-6  # added to squared singular values: a root has no gradient at 0
NEAR = 1e-3  # eigenvalues closer than this turn into one another at a bounded rate
LEAN = 1e-3  # how much heavier the first view is where the sign of a direction is decided


class PmrlConfig(ObjectiveConfig):
    """`spectral_temperature` and `instance_temperature` are tau_1 and tau_2 (the authors' scripts: 0.05 and 0.1)."""

    kind: Literal["pmrl"] = "pmrl"
    spectral_temperature: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    instance_temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    instance_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"spectral_temperature": 0.5, "instance_temperature": 0.2, "instance_weight": 2.0}]

    def build(self, views: Sequence[str], collectives: Collectives) -> Pmrl:
        return Pmrl(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        table = gathered * dim * 4
        return super().memory(views, rows, gathered, dim) + (4 * views + 6) * table + gathered * views**2 * 8 * 6


class Pmrl(nn.Module):
    """Principled multimodal representation learning (Liu et al. 2025), exact on the gathered batch. No anchor view.

    With Z_i the d x k matrix of the views of row i, sigma_1 >= ... >= sigma_k its singular values and u_i its leading
    left singular vector:

        L = mean_i [ -log softmax_m(sigma_m / tau_1)_1 ] + w mean_i [ -log softmax_j(<u_i, u_j> / tau_2)_i ]

    The first term is least where the views agree (Z_i of rank one); the second keeps samples apart, over the rows of
    every rank (the authors' code: over one rank's).

    Singular values and vectors come from the k x k Gram matrix G = Z^T Z = W diag(sigma^2) W^T, not from Z. A singular
    vector has no sign of its own: u_i points along the mean of the views, the first of them a little heavier, so that
    two views at more than a right angle, whose mean is orthogonal to u_i, have a sign too. The gradient is that of
    perturbation theory, d(sigma_m^2) = w_m^T dG w_m and dw_1 = sum_m w_m (w_m^T dG w_1) / (sigma_1^2 - sigma_m^2), with
    the differences kept above 0.001 and 1e-6 added to sigma^2: finite where values coincide or are 0.

    The matching head of the paper is a classifier on fused tokens, not a function of embeddings, and is not here. A row
    that lacks a view counts nowhere; rows of equal ids are no negatives of one another. Cost for b of n rows: b n d +
    n k^2 d multiplications; memory O(k n d) and one tile.
    """

    def __init__(self, config: PmrlConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.views = config, list(views)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        ours, theirs = complete(local, self.views), complete(gathered, self.views)
        own, all_tuples = spectrum(torch.stack(ours.z, dim=1)), spectrum(torch.stack(theirs.z, dim=1))
        mean = tuple_mean(local, gathered, theirs)
        logits = own.values / self.config.spectral_temperature
        spectral = mean(logits.logsumexp(dim=1) - logits[:, 0])
        scale = own.leading.new_full((1,), 1 / self.config.instance_temperature)
        valid, ids = torch.ones_like(theirs.ids, dtype=torch.bool), (ours.ids, theirs.ids)
        negatives, _ = autograd.logsumexp(own.leading, all_tuples.leading, scale, valid, exclude_same_id=ids)
        positive = scale * own.leading.square().sum(dim=1)
        instance = mean(torch.logaddexp(negatives, positive) - positive)
        leading_share = own.values[:, 0].square() / own.values.square().sum(dim=1)
        return Losses(
            spectral + self.config.instance_weight * instance,
            {
                "loss/spectral": spectral.detach(),
                "loss/instance": instance.detach(),
                "leading_share": mean(leading_share.detach()),
            },
        )


class Spectrum(NamedTuple):
    values: Float[Tensor, "n m"]  # singular values, descending
    leading: Float[Tensor, "n d"]  # the leading left singular vector, of length one


def spectrum(z: Float[Tensor, "n k d"]) -> Spectrum:
    """The min(k, d) singular values of n sets of k rows, and their leading direction along the mean of the rows."""
    gram = (z @ z.mT).double()
    fixed = gram.detach()
    # eigh raises on values that are not finite; these reach the loss by way of `gram`.
    squares, w = torch.linalg.eigh(torch.where(fixed.isfinite(), fixed, 0.0))
    squares, w = squares.flip(1), w.flip(2)
    sign = (w[:, :, 0].sum(dim=1) + LEAN * w[:, 0, 0]).sign()
    first = w[:, :, 0] * torch.where(sign == 0, 1.0, sign)[:, None]
    moved = torch.einsum("nim,nij->nmj", w, gram)
    values = torch.einsum("nmj,njm->nm", moved, w)[:, : z.shape[2]].clamp_min(0).add(FLAT).sqrt()
    gaps = (squares[:, :1] - squares[:, 1:]).clamp_min(NEAR)
    turn = torch.einsum("nim,nij,nj->nm", w[:, :, 1:], gram - fixed, first) / gaps
    weights = first + torch.einsum("nim,nm->ni", w[:, :, 1:], turn)
    leading = torch.einsum("nk,nkd->nd", weights.to(z.dtype), z)
    return Spectrum(values.to(z.dtype), normalize(leading, dim=1))

"""GRAM: contrast of whole tuples by the volume that their views span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._tuples import AnchoredTupleConfig, TupleFeatures, Tuples, complete, contrast, tuple_mean
from mvpretrain.similarity.autograd import Tensors
from mvpretrain.types import Embeddings, Losses

FLAT = 1e-6  # added to the squared volume: a root has no gradient at 0


class GramConfig(AnchoredTupleConfig):
    """The volume of tuples; `anchor` is the view that other rows replace: a name, `all` in turn, or the first.

    `label_smoothing` spreads that part of the target over all candidates (0.1 in the authors' code); it costs one more
    pass over them.
    """

    kind: Literal["gram"] = "gram"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"anchor": "all", "label_smoothing": 0.1}]

    def check(self, views: Sequence[str]) -> None:
        self.anchor_views(views)
        self.temperature.refuse_per_pair("gram compares whole tuples and has one temperature")

    def build(self, views: Sequence[str], collectives: Collectives) -> Gram:
        return Gram(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        packed = 3 * gathered * views * dim * 4  # whole tuples, their other views side by side, and the gradient
        recursion = gathered * views**3 * 8 * 3  # the adjugates' powers, in float64
        tile, anchors = 512 * 1024 * views * 8 * 4, views if self.anchor == "all" else 1
        return super().memory(views, rows, gathered, dim) + anchors * (packed + recursion) + tile


class Gram(nn.Module):
    """The volume contrast of Cicchetti et al. 2025 (GRAM, ICLR), exact on the gathered batch.

    The volume that k unit rows span, with G their k x k Gram matrix:

        V(z^1, ..., z^k) = sqrt(det G + 1e-6),    0 (that is, 0.001) where all agree, 1 where all are orthogonal

    and, with V_ij that of the anchor's view of row i and the other views of row j,

        L = mean_i [ CE_j(-V_ij / tau) + CE_j(-V_ji / tau) ] / 2,    target j = i    (mean over anchors, if `all`)

    Only the anchor is replaced, so that the Gram matrix B_j of the other views belongs to row j alone. With g_ij the
    k - 1 similarities between anchor i and them, det G_ij = |z_i|^2 det B_j - g_ij^T adj(B_j) g_ij: a polynomial, which
    needs no inverse where B_j is singular, and with the added 1e-6 has a finite gradient at perfect alignment, where
    that of the authors' code is NaN. With k = 2, V = sqrt(1 - s^2).

    The volume stays the same when a row changes its sign: views that are opposite are as aligned to it as views that
    are equal. Where that matters, add a pairwise objective.

    A row that lacks a view has no tuple and counts nowhere; rows of equal ids are no negatives of one another. Cost for
    b of n rows: 2 (k - 1) b n d multiplications an anchor; memory O(k n d) and one tile of 8 k layers. The k x k part
    is in float64, where the rounding of det G grows as (k - 1)^(k - 1): below 1e-9 up to k = 10, 5e-7 at k = 12. State:
    log tau, shape [1].
    """

    def __init__(self, config: GramConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.views = config, list(views)
        self.log_temperature = config.temperature.parameter()

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        ours, theirs = complete(local, self.views), complete(gathered, self.views)
        mean = tuple_mean(local, gathered, theirs)
        found = contrast(self.config, self.views, ours, theirs, mean, features, score, temperature)
        volume = mean((-found.own * temperature).detach())
        return Losses(found.total, {"temperature": temperature[0].detach(), **found.parts, "volume": volume})


def features(tuples: Tuples, at: int) -> TupleFeatures:
    """Of the anchor, the view of that index, its row and squared length; of the others their rows, det B and adj B."""
    anchor, others = tuples.z[at], torch.stack([z for v, z in enumerate(tuples.z) if v != at], dim=1)
    wide = others.double()
    adjugate, determinant = adjugate_and_determinant(wide @ wide.mT)
    return TupleFeatures(
        (anchor, anchor.square().sum(dim=1)),
        (others, determinant.to(anchor.dtype), adjugate.to(anchor.dtype)),
        tuples.ids,
    )


def score(anchors: Tensors, rests: Tensors, shared: Tensors) -> Float[Tensor, "*batch b n"]:
    """-V / tau of each anchor with each tuple's rest."""
    (z, length), (others, determinant, adjugate), (temperature,) = anchors, rests, shared
    g = [z @ x.mT for x in others.unbind(-2)]
    squared = length[..., :, None] * determinant[..., None, :]
    for m, row in enumerate(g):
        product = adjugate[..., None, :, m, m] * row
        for n in range(m + 1, len(g)):
            product = product + 2 * adjugate[..., None, :, m, n] * g[n]
        squared = squared - product * row
    # Rounding can take a volume of 0 to slightly below it.
    return -(squared.clamp_min(0) + FLAT).sqrt() / temperature


def adjugate_and_determinant(a: Float[Tensor, "n m m"]) -> tuple[Float[Tensor, "n m m"], Float[Tensor, " n"]]:
    """adj(A) with A adj(A) = det(A) I, and det(A), for singular matrices too.

    By the recursion of Faddeev and Le Verrier: M_1 = I, M_(i+1) = A M_i - tr(A M_i) / i I; adj A = +-M_m.
    """
    m = a.shape[-1]
    eye = torch.eye(m, dtype=a.dtype, device=a.device)
    found = eye.expand_as(a)
    for i in range(1, m):
        product = a @ found
        found = product - product.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] / i * eye
    sign = (-1) ** (m - 1)
    return sign * found, sign * (a @ found).diagonal(dim1=1, dim2=2).sum(dim=1) / m

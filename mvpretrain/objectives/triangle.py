"""TRIANGLE: contrast of triples by the area of the triangle that their views are the corners of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._tuples import AnchoredTupleConfig, TupleFeatures, Tuples, complete, contrast, tuple_mean
from mvpretrain.similarity.autograd import Tensors
from mvpretrain.types import Embeddings, Losses

FLAT = 1e-6  # added to the squared area, times four: a root has no gradient at 0


class TriangleConfig(AnchoredTupleConfig):
    """The area of triples; `anchor` is the view that other rows replace: a name, `all` in turn, or the first.

    `alpha` weighs the mean cosine between the anchor and the other two, which is taken off the area. `label_smoothing`
    spreads that part of the target over all candidates (0.1 in the authors' code); it costs one more pass over them.
    """

    kind: Literal["triangle"] = "triangle"
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"anchor": "all", "alpha": 0.5, "label_smoothing": 0.1}]

    def takes(self, k: int) -> bool:
        return k == 3

    def check(self, views: Sequence[str]) -> None:
        if len(views) != 3:
            raise ValueError(
                f"objective kind 'triangle' takes 3 views, got {len(views)}: {', '.join(views)}; kind 'gram' takes "
                "any number"
            )
        self.anchor_views(views)
        self.temperature.refuse_per_pair("triangle compares whole triples and has one temperature")

    def build(self, views: Sequence[str], collectives: Collectives) -> Triangle:
        return Triangle(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        packed = 2 * gathered * views * dim * 4  # whole triples, and their gradient
        anchors = views if self.anchor == "all" else 1
        return super().memory(views, rows, gathered, dim) + anchors * packed + 512 * 1024 * 24 * 4


class Triangle(nn.Module):
    """The area contrast of Cicchetti et al. 2025 (TRIANGLE, NeurIPS), exact on the gathered batch.

    The area of the triangle with three unit rows as corners, u = z^2 - z^1 and v = z^3 - z^1:

        A(z^1, z^2, z^3) = 1/2 sqrt( |u|^2 |v|^2 - <u, v>^2 + 1e-6 ),    0 (that is, 0.0005) where all agree

    and, with A_ij that of the anchor's view of row i and the other views of row j,

        L = mean_i [ CE_j((alpha cos_ij - A_ij) / tau) + CE_j((alpha cos_ji - A_ji) / tau) ] / 2,    target j = i

    cos_ij is the mean of the anchor's two cosines; `alpha` is 0 in the paper's loss, its evaluation subtracts a cosine.
    The area has the square root that is printed in the paper; the authors' code leaves it out and works with 2 A^2.
    With the added 1e-6 the gradient is finite at area 0. Everything is a function of similarities: two tiles of them
    and one number a triple, no differences of rows.

    A row that lacks a view has no triple and counts nowhere; rows of equal ids are no negatives of one another. Cost
    for b of n rows: 4 b n d multiplications an anchor; memory O(n d) and one tile. State: log tau, shape [1].
    """

    def __init__(self, config: TriangleConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.views = config, list(views)
        self.log_temperature = config.temperature.parameter()

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        temperature = self.config.temperature.bounded(self.log_temperature)
        ours, theirs = complete(local, self.views), complete(gathered, self.views)
        mean = tuple_mean(local, gathered, theirs)
        parts = {"temperature": temperature[0].detach(), "area": mean(areas(*ours.z)).detach()}
        found = contrast(self.config, self.views, ours, theirs, mean, features, self.score, temperature)
        return Losses(found.total, parts | found.parts)

    def score(self, anchors: Tensors, rests: Tensors, shared: Tensors) -> Float[Tensor, "*batch b n"]:
        """(alpha cos - A) / tau of each anchor with the other two views of each triple."""
        (a, aa), (b, c, bb, cc, bc), (temperature,) = anchors, rests, shared
        ab, ac, aa = a @ b.mT, a @ c.mT, aa[..., :, None]
        bb, cc, bc = (x[..., None, :] for x in (bb, cc, bc))
        uu, vv, uv = aa + bb - 2 * ab, aa + cc - 2 * ac, aa + bc - ab - ac
        cosine = (ab + ac) / 2
        return (self.config.alpha * cosine - area(uu, vv, uv)) / temperature


def features(triples: Tuples, at: int) -> TupleFeatures:
    """Of the anchor, the view of that index, its row and squared length; of the other two their rows, squared lengths,
    and inner product.
    """
    a, (b, c) = triples.z[at], (z for v, z in enumerate(triples.z) if v != at)
    return TupleFeatures((a, squared(a)), (b, c, squared(b), squared(c), (b * c).sum(dim=1)), triples.ids)


def squared(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return x.square().sum(dim=1)


def area(uu: Float[Tensor, "*s"], vv: Float[Tensor, "*s"], uv: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Half the root of |u|^2 |v|^2 - <u, v>^2, which rounding can take slightly below 0."""
    return (uu * vv - uv.square()).clamp_min(0).add(FLAT).sqrt() / 2


def areas(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], c: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The areas of n triples, for the log."""
    u, v = b - a, c - a
    return area(squared(u), squared(v), (u * v).sum(dim=1))

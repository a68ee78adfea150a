"""Symile: contrast of whole tuples by the multilinear inner product of their views."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor, nn

from mvpretrain.config import Config
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.id_table import splitmix64
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.objectives._temperature import bounded_exp
from mvpretrain.objectives._tuples import Tuples, complete, tuple_mean
from mvpretrain.similarity.autograd import Tensors, logsumexp, logsumexp_of_score
from mvpretrain.types import Embeddings, Losses

MIXED = -1  # stands for the sample of a tuple whose views come from several


class Scale(Config):
    """The factor on inner products, as a multiple of d^((k-1)/2) or (`per_dim: false`) as it is.

    The inner product of k independent random unit rows has the standard deviation d^(-(k-1)/2), so that at 1 logits
    start with a deviation of one for any d and k; with k = 2 and d = 256 that is a temperature of 1/16. Learnable ones
    are kept within [min, max].
    """

    init: float = 1.0
    min: float = 0.01
    max: float = 10.0
    learnable: bool = True
    per_dim: bool = True

    @model_validator(mode="after")
    def _within(self) -> Scale:
        if not 0 < self.min <= self.init <= self.max:
            raise ValueError(f"needs 0 < min <= init <= max, got min={self.min} init={self.init} max={self.max}")
        return self


class SymileConfig(ObjectiveConfig):
    """`negatives`: `linear` draws n tuples for each anchor view, `quadratic` takes every combination of the others.

    Combinations are n^(k-1): quadratic with three views, which it is for; more views take more.
    """

    kind: Literal["symile"] = "symile"
    negatives: Literal["linear", "quadratic"] = "linear"
    scale: Scale = Scale()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"negatives": "quadratic", "scale": {"init": 2.0, "per_dim": False}}]

    def build(self, views: Sequence[str], collectives: Collectives) -> Symile:
        return Symile(self, views)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        table = gathered * dim * 4
        if self.negatives == "linear":
            combined = (views * (2 * views - 1) + 4) * table  # shuffled views and their products, for each anchor
        else:
            numbers = views * gathered ** (views - 1) * 17  # of each combination, whose it is, and that it counts
            combined = numbers + 2 * views * table + 4 * views * 1024 * dim * 4
        return super().memory(views, rows, gathered, dim) + combined


class Symile(nn.Module):
    """The mean over anchor views of Symile's loss (Saporta et al. 2024, NeurIPS), exact on the gathered batch.

    The multilinear inner product of k rows, and the loss of view u of row i, with a scale a:

        MIP(z^1, ..., z^k) = sum_d prod_v z_d^v
        l_i^u = -log [ e^(a MIP_i) / (e^(a MIP_i) + sum_t e^(a MIP_(i,t))) ]

    MIP_i is that of the row's own views; MIP_(i,t) has the anchor z_i^u and, in the other k - 1 positions, a tuple t of
    views of any rows:

    - `linear`: n tuples. Each other view is put into a random order of its own, and the t-th rows of all orders are the
      tuple t; anchors of one view share them. Orders are drawn anew at every step, by a hash of (sample id, views,
      step): they are the same on all ranks, and whatever the order of the samples.
    - `quadratic`: every combination of rows, n^2 tuples with k = 3.

    A tuple whose views are all of the anchor's own sample is the positive, or a copy of it, and no negative; one where
    only some are stays. With k = 2 both are infonce with equal ids left out of the negatives.

    A row that lacks a view has no tuple, neither as an anchor nor for others. Unlike a cosine, the product does not
    reward equal rows as such: for odd k it is negative where equal coordinates are. Cost for b of n rows: k b n d
    multiplications, `quadratic` n^(k-2) times that; memory O(k^2 n d) and one tile, `quadratic` O(k n d + k n^(k-1)).
    State: log scale, shape [1], and the number of steps taken in training, shape [1].
    """

    def __init__(self, config: SymileConfig, views: Sequence[str]):
        super().__init__()
        self.config, self.views = config, list(views)
        self.log_scale = nn.Parameter(torch.full((1,), config.scale.init).log(), requires_grad=config.scale.learnable)
        self.step: Tensor
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        ours, theirs = complete(local, self.views), complete(gathered, self.views)
        s, k, d = self.config.scale, len(self.views), theirs.z[0].shape[1]
        factor = bounded_exp(self.log_scale, s.min, s.max)
        scale = factor * d ** ((k - 1) / 2) if s.per_dim else factor
        mean = tuple_mean(local, gathered, theirs)
        # Numbers of samples from 0 on, so that MIXED is none of them.
        known, samples = theirs.ids.unique(return_inverse=True)
        own = torch.searchsorted(known, ours.ids)
        positive = scale * product(ours.z).sum(dim=1)
        parts: dict[str, Tensor] = {"scale": factor[0].detach()}
        values = []
        for u, view in enumerate(self.views):
            rest = [z for v, z in enumerate(theirs.z) if v != u]
            if self.config.negatives == "linear":
                orders = self.orders(theirs, u)
                drawn = [z[order] for z, order in zip(rest, orders)]
                negatives = linear_negatives(ours.z[u], own, drawn, [samples[order] for order in orders], scale)
            else:
                negatives = quadratic_negatives(ours.z[u], own, rest, samples, scale)
            values.append(mean(torch.logaddexp(negatives.lse, positive) - positive))
            parts[f"loss/{view}"] = values[-1].detach()
            parts[f"accuracy/{view}"] = mean(positive > negatives.top)
        if self.training:
            self.step += 1
        return Losses(torch.stack(values).mean(), parts)

    @torch.no_grad()
    def orders(self, gathered: Tuples, u: int) -> list[Int[Tensor, " n"]]:
        """For each view but u, an order of the rows."""
        # Rows of one id have one hash; what they hold decides between them, so that their order in the table does not.
        by_content = torch.stack(gathered.z).sum(dim=0)[:, 0].argsort()
        k = len(self.views)
        found = []
        for v in (v for v in range(k) if v != u):
            salt = (self.step * k + u) * k + v
            keys = splitmix64(gathered.ids[by_content] + splitmix64(salt))
            found.append(by_content[keys.argsort(stable=True)])
        return found


class NegativeSums(NamedTuple):
    """What each local anchor finds in the tuples that are not wholly of its own sample."""

    lse: Float[Tensor, " b"]  # log-sum-exp of the scaled inner products; -inf where there is no tuple
    top: Float[Tensor, " b"]  # the largest of them; no gradient


def linear_negatives(
    anchor: Float[Tensor, "b d"],
    own: Int[Tensor, " b"],
    rest: Sequence[Float[Tensor, "n d"]],
    samples: Sequence[Int[Tensor, " n"]],
    scale: Float[Tensor, "1"],
) -> NegativeSums:
    """The t-th rows of the tables `rest` are a tuple; `samples` says whose rows they are, `own` whose the anchors."""
    products, owners = product(rest), sample_of(samples)
    lse, argmax = logsumexp(anchor, products, scale, owners >= MIXED, exclude_same_id=(own, owners))
    with torch.no_grad():
        top = scale * (anchor * products[argmax]).sum(dim=1)
    return NegativeSums(lse, top.masked_fill(lse == -torch.inf, -torch.inf))


def quadratic_negatives(
    anchor: Float[Tensor, "b d"],
    own: Int[Tensor, " b"],
    rest: Sequence[Float[Tensor, "n d"]],
    samples: Int[Tensor, " n"],
    scale: Float[Tensor, "1"],
) -> NegativeSums:
    """Every combination of rows of the tables is a tuple; their products are made when a tile needs them."""
    n = len(samples)
    numbers = torch.arange(n ** len(rest), device=samples.device)

    def rows_of(numbers: Tensor) -> list[Tensor]:
        """The row of each table in the tuples of these numbers: digits to the base n."""
        return [numbers // n**digit % n for digit in range(len(rest))]

    def score(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        scale, *rest = shared
        return (rows[0] * scale) @ product([z[i] for z, i in zip(rest, rows_of(columns[0]))]).T

    owners = sample_of([samples[i] for i in rows_of(numbers)])
    lse, argmax = logsumexp_of_score(
        score, (anchor,), (numbers,), (scale, *rest), owners >= MIXED, exclude_same_id=(own, owners)
    )
    with torch.no_grad():
        top = scale * (anchor * product([z[i] for z, i in zip(rest, rows_of(numbers[argmax]))])).sum(dim=1)
    return NegativeSums(lse, top.masked_fill(lse == -torch.inf, -torch.inf))


def product(tables: Sequence[Float[Tensor, "n d"]]) -> Float[Tensor, "n d"]:
    return reduce(torch.mul, tables)


def sample_of(samples: Sequence[Int[Tensor, " t"]]) -> Int[Tensor, " t"]:
    """The sample that all views of a tuple are of, or MIXED."""
    same = torch.stack([s == samples[0] for s in samples]).all(dim=0)
    return samples[0].masked_fill(~same, MIXED)

"""Any view from any other: recall at 1, 5 and 10, the median rank, and what chance would score."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.evaluation import Evaluated, Evaluator, EvaluatorConfig
from mvpretrain.evaluation._collect import Table
from mvpretrain.model.task import Task

AT = (1, 5, 10)
TIE = 1e-6  # similarities of unit rows in float32 that differ by less are equal: the rest is rounding
ENTRIES = 1 << 24  # of the block of similarities that is held at once

Fusion = Literal["rest", "product"]


class RetrievalConfig(EvaluatorConfig):
    """`retrieval` with these views scored by label."""

    kind: Literal["retrieval"] = "retrieval"
    by_label: tuple[str, ...] = ()

    def build(self, task: Task, collectives: Collectives) -> Evaluator:
        return partial(_evaluate, self.by_label)


def _evaluate(by_label: Collection[str], evaluated: Evaluated) -> Iterator[tuple[str, float]]:
    return retrieval(evaluated.table, evaluated.collectives, evaluated.device, by_label)


class Side(NamedTuple):
    """The rows that take part as queries or as candidates; equal keys are hits, a key may be `NONE`."""

    z: Float[Tensor, "n d"]
    keys: Int64[Tensor, " n"]


def retrieval(
    table: Table,
    collectives: Collectives,
    device: torch.device,
    by_label: Collection[str] = (),
    fusions: Sequence[Fusion] = ("rest",),
) -> Iterator[tuple[str, float]]:
    """Yields (name, value) for every ordered pair of views: `retrieval/image-text/R@1` ranks texts for an image.

    R@K is the part (0 to 1) of queries with a positive among the K nearest candidates by cosine; `median_rank` counts
    from 1; `chance` is the R@1 of a random order; `queries` their number. Positives have the query's id or, in pairs
    with a view of `by_label`, its label. Rows absent in the first view are no queries, rows absent in the second no
    candidates, and queries without a positive do not count; a pair without queries has only `queries`, 0.
    `retrieval/mean/R@1` is the mean over pairs. With three views or more, `rest-image` looks for the image with the
    mean of the other views that are there, and `product-image`, where `fusions` names it, with their product.

    Equal similarities are taken in random order: R@K is then the expected one, and the rank the expected rank of the
    first positive. A collapsed encoder scores exactly chance.

    Every rank must call this and exhaust it: each scores a part of the queries, one gather a pair.
    """
    firsts = []
    for u, v in permutations(table.z, 2):
        keys = table.labels if u in by_label or v in by_label else table.ids
        yield from (found := summary(f"{u}-{v}", *sides(table, keys, u, v), collectives, device))
        firsts += [value for name, value in found if name.endswith("/R@1")]
    if firsts:
        yield "retrieval/mean/R@1", sum(firsts) / len(firsts)
    for fusion in fusions if len(table.z) > 2 else ():
        for v in table.z:
            keys = table.labels if v in by_label else table.ids
            both = sides(fused(table, v, fusion), keys, fusion, v)
            yield from summary(f"{fusion}-{v}", *both, collectives, device)


def fused(table: Table, v: str, fusion: Fusion) -> Table:
    """The table with one more view, of unit rows, that is made of the views other than v that a row has.

    `rest` is their mean, `product` their product coordinate by coordinate: its inner products with v are the scores of
    Symile (Saporta et al., NeurIPS 2024).
    """
    others = [u for u in table.z if u != v]
    z = torch.stack([table.z[u] for u in others])
    present = torch.stack([table.present[u] for u in others])
    absent, has_other = ~present[:, :, None], present.any(dim=0)
    made = z.masked_fill(absent, 0).sum(dim=0) if fusion == "rest" else z.masked_fill(absent, 1).prod(dim=0)
    # A product of many coordinates below one is too short for float32's squares long before it is zero.
    scale = made.abs().amax(dim=1, keepdim=True)
    made = normalize(made / scale.where(scale > 0, 1), dim=1)
    return table._replace(z={**table.z, fusion: made}, present={**table.present, fusion: has_other})


def sides(table: Table, keys: Tensor, u: str, v: str) -> tuple[Side, Side]:
    """(queries, candidates) of a pair: present rows, and of the queries those that have a positive."""
    known = keys >= 0 if keys is table.labels else torch.ones_like(keys, dtype=torch.bool)
    to = table.present[v]
    of = table.present[u] & known & torch.isin(keys, keys[to & known])
    return Side(table.z[u][of], keys[of]), Side(table.z[v][to], keys[to])


def summary(
    name: str, queries: Side, candidates: Side, collectives: Collectives, device: torch.device
) -> list[tuple[str, float]]:
    """The figures of one pair, the same on every rank."""
    count = len(queries.keys)
    if not count:
        return [(f"retrieval/{name}/queries", 0.0)]
    rows = -(-count // collectives.size)  # a rank; the last ones may have less: NaN fills them up to the same number
    mine = slice(rows * collectives.rank, min(rows * (collectives.rank + 1), count))
    local = outcomes(Side(queries.z[mine], queries.keys[mine]), candidates, device)
    local = torch.cat([local, local.new_full((rows - len(local), local.shape[1]), torch.nan)])
    gathered = collectives.gather(local).cpu()[:count]
    *recalls, chance = gathered[:, 1:].mean(dim=0).tolist()
    figures = {f"R@{k}": recall for k, recall in zip(AT, recalls)}
    figures |= {"median_rank": float(gathered[:, 0].quantile(0.5)), "chance": chance, "queries": float(count)}
    return [(f"retrieval/{name}/{key}", value) for key, value in figures.items()]


def outcomes(queries: Side, candidates: Side, device: torch.device) -> Float[Tensor, "q 5"]:
    """For each query: rank of the first positive, hit at 1, 5 and 10, and chance of a hit at 1; float64, on the device.

    Blocks of queries against all candidates; positives and others are read from the same product, since two ways of
    computing one similarity differ in the last digit and would break ties.
    """
    z, keys = candidates.z.to(device), candidates.keys.to(device)
    assert not torch.is_autocast_enabled(device.type), "similarities in bfloat16 would all be ties"
    found = [torch.empty(0, 2 + len(AT), dtype=torch.float64, device=device)]
    for at in range(0, len(queries.keys), step := max(1, ENTRIES // len(keys))):
        similarity = queries.z[at : at + step].to(device) @ z.T
        positive = queries.keys[at : at + step].to(device)[:, None] == keys
        best = similarity.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        level = (similarity - best).abs() <= TIE
        above = (similarity > best + TIE).sum(dim=1).double()
        tied, own = (level & ~positive).sum(dim=1).double(), (level & positive).sum(dim=1).double()
        own = own.masked_fill(own == 0, torch.nan)  # only where embeddings are not finite: that must not score
        rank = 1 + above + tied / (own + 1)
        chance = positive.double().mean(dim=1)
        found.append(torch.stack([rank, *(hit(above, tied, own, k) for k in AT), chance], dim=1))
    return torch.cat(found)


def hit(above: Tensor, tied: Tensor, own: Tensor, k: int) -> Float[Tensor, " q"]:
    """The probability that the first k places hold a positive.

    `above` others come first for certain, then `tied` others and `own` positives in random order: of the k - above
    places that are left, all go to others with probability prod_j (tied - j) / (tied + own - j).
    """
    miss = torch.ones_like(above)
    for j in range(k):
        factor = (tied - j).clamp_min(0) / (tied + own - j).clamp_min(1)
        miss = torch.where(j < k - above, miss * factor, miss)
    return 1 - miss

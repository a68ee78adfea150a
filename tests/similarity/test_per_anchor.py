"""Sums over candidates at a temperature for each anchor, against dense matrices, on one process and on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain.distributed.collectives import ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.similarity.per_anchor import PerAnchorSums, per_anchor
from mvpretrain.testing.tables import draw, leaves, names, part_of, table
from mvpretrain.types import Embeddings

DIRECTIONS = [("view0", "view2"), ("view2", "view0"), ("view1", "view1")]


def temperatures(rows: int) -> Tensor:
    return draw(7, len(DIRECTIONS), rows).abs() + 0.5


def dense(whole: Embeddings, scale: Tensor, a: str, c: str, exclude_same_id: bool) -> PerAnchorSums:
    """One direction, from the matrix of all similarities."""
    s = whole.z[a] @ whole.z[c].T
    same = whole.ids[:, None] == whole.ids
    present = whole.present[c].expand(len(s), -1) & ~(same & exclude_same_id)
    positives = whole.present[c] & same
    scaled = (s * scale[:, None]).masked_fill(~(present & whole.present[a][:, None]), -torch.inf)
    weights = scaled.softmax(dim=1).nan_to_num()
    return PerAnchorSums(
        scaled.logsumexp(dim=1),
        (weights * s * scale[:, None]).sum(dim=1),
        scaled.argmax(dim=1),
        s.masked_fill(scaled == -torch.inf, -torch.inf).amax(dim=1),
        (s * positives).sum(dim=1) / positives.sum(dim=1).clamp_min(1),
        present.sum(dim=1),
        whole.present[a] & positives.any(dim=1),
    )


def weighted(found: list[PerAnchorSums], weights: Tensor) -> Tensor:
    """Some scalar in which every output with a gradient counts."""
    values = []
    for f, w in zip(found, weights, strict=True):
        counts = f.is_anchor & (f.candidates > 0)
        values.append((w[0] * f.lse.masked_fill(~counts, 0) + w[1] * f.positive.masked_fill(~counts, 0)).sum())
    return torch.stack(values).sum()


@pytest.mark.parametrize("exclude_same_id", [False, True])
@pytest.mark.parametrize("gradient", ["features", "scalars"])
def test_sums_and_gradients_are_those_of_the_matrix(gradient, exclude_same_id):
    whole, scales = leaves(table(3, dtype=torch.float64)), temperatures(12).requires_grad_()
    found = per_anchor(whole, whole, DIRECTIONS, scales, SingleProcess(), exclude_same_id, gradient)
    slow = [dense(whole, scales[w], a, c, exclude_same_id) for w, (a, c) in enumerate(DIRECTIONS)]
    for (a, _), f, s in zip(DIRECTIONS, found, slow, strict=True):
        for name, one, other in zip(PerAnchorSums._fields, f, s, strict=True):
            rows = whole.present[a] & (f.candidates > 0)
            if one.is_floating_point() or name == "argmax":
                torch.testing.assert_close(one[rows], other[rows], msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert torch.equal(one, other), name
    inputs, weights = [*whole.z.values(), scales], draw(8, len(DIRECTIONS), 2, 12)
    ours = torch.autograd.grad(weighted(found, weights), inputs)
    for one, other in zip(ours, torch.autograd.grad(weighted(slow, weights), inputs), strict=True):
        torch.testing.assert_close(one, other)


def gradients(rank: int, gradient: str, size: int) -> dict[str, Tensor]:
    collectives: Any = ProcessGroup()
    mine = leaves(part_of(table(3, dtype=torch.float64), rank, size))
    local, gathered = gather_embeddings(mine, collectives)
    b = len(local.ids)
    begin = sum(len(part_of(table(3), r, size).ids) for r in range(rank))
    place = torch.arange(begin, begin + b).clamp_max(11)
    found = per_anchor(local, gathered, DIRECTIONS, temperatures(12)[:, place], collectives, True, gradient)  # type: ignore[arg-type]
    weighted(found, draw(8, len(DIRECTIONS), 2, 12)[:, :, place]).backward()
    return {v: z.grad for v, z in mine.z.items() if z.grad is not None}


@pytest.mark.parametrize("gradient", ["features", "scalars"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_gets_the_gradient_of_its_rows(ranks, gradient, size):
    whole = leaves(table(3, dtype=torch.float64))
    slow = [dense(whole, temperatures(12)[w], a, c, True) for w, (a, c) in enumerate(DIRECTIONS)]
    weighted(slow, draw(8, len(DIRECTIONS), 2, 12)).backward()
    parts = ranks(size).run(gradients, gradient, size)
    for v in names(3):
        wanted = whole.z[v].grad
        assert wanted is not None
        torch.testing.assert_close(torch.cat([part[v] for part in parts]), wanted)


def messages(rank: int, gradient: str) -> list[str]:
    """Kinds of messages of a backward."""
    mine = leaves(part_of(table(3, dtype=torch.float64), rank, 2))
    local, gathered = gather_embeddings(mine, ProcessGroup())
    scales = torch.full((3, len(local.ids)), 2.0, dtype=torch.float64)
    found = per_anchor(local, gathered, DIRECTIONS, scales, ProcessGroup(), True, gradient)  # type: ignore[arg-type]
    total = weighted(found, draw(8, 3, 2, len(local.ids)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        total.backward()
    return [e.key for e in profiler.key_averages() if e.key.startswith("c10d::") for _ in range(e.count)]


def test_scalars_send_no_rows_back(ranks):
    (scalars, _), (features, _) = (ranks(2).run(messages, kind) for kind in ("scalars", "features"))
    assert len(scalars) == 1 and "gather" in scalars[0] and len(features) == 1 and "scatter" in features[0]


def test_an_objective_of_other_ranks_is_refused():
    whole = table(3)
    with pytest.raises(ValueError, match=r"has 12 rows and this rank's 6, but the objective was built for 1 rank"):
        per_anchor(
            part_of(whole, 0, 2)._replace(ids=whole.ids[:6]), whole, DIRECTIONS, torch.ones(3, 6), SingleProcess(), True
        )

"""Retrieval against a loop over single queries, on tables with gaps, labels, ties, and on several ranks."""

from __future__ import annotations

import itertools
import math
import random
from statistics import median

import pytest
import torch
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation import retrieval as module
from mvpretrain.evaluation._collect import Table
from mvpretrain.evaluation.retrieval import retrieval

CPU = torch.device("cpu")


def table(n: int = 60, seed: int = 0, noise: float = 1.0) -> Table:
    """Three views of n samples: some ids twice, gaps in the second view, four classes, a few labels unknown."""
    make = torch.Generator().manual_seed(seed)
    truth = torch.randn(n, 4, generator=make)
    z = {v: normalize(truth + noise * torch.randn(n, 4, generator=make), dim=1) for v in ("image", "text", "sound")}
    ids = torch.randperm(10 * n, generator=make)[:n] - 5 * n
    ids[7], ids[11] = ids[2], ids[3]
    labels = torch.randint(4, (n,), generator=make)
    labels[::9] = -1
    present = {v: torch.ones(n, dtype=torch.bool) for v in z}
    present["text"] = torch.rand(n, generator=make) > 0.3
    present["sound"][1] = False
    return Table(z, {}, ids, present, labels)


def scores(found: Table, by_label: tuple[str, ...] = (), rank: int = 0) -> dict[str, float]:
    return dict(retrieval(found, SingleProcess(), CPU, by_label))


def one_query(query: torch.Tensor, candidates: torch.Tensor, good: list[bool]) -> tuple[float, dict[int, float]]:
    """(expected rank of the first positive, expected hits) by listing every order of equal similarities."""
    values = [round(float(s), 5) for s in candidates @ query]
    best = max(s for s, g in zip(values, good) if g)
    above, equal = sum(s > best for s in values), [g for s, g in zip(values, good) if s == best]
    if len(equal) > 5:
        draw = random.Random(0)
        orders = [draw.sample(equal, len(equal)) for _ in range(4000)]
    else:
        orders = list(itertools.permutations(equal))
    places = [above + 1 + order.index(True) for order in orders]
    hits = {k: sum(p <= k for p in places) / len(places) for k in (1, 5, 10)}
    return sum(places) / len(places), hits


def slow(t: Table, u: str, v: str, by_label: bool) -> dict[str, float]:
    keys = t.labels if by_label else t.ids
    columns = [j for j in range(len(t.ids)) if t.present[v][j]]
    ranks, hits, chance = [], {1: [], 5: [], 10: []}, []
    for i in range(len(t.ids)):
        good = [bool(keys[j] == keys[i]) for j in columns]
        if not t.present[u][i] or not any(good) or (by_label and keys[i] < 0):
            continue
        rank, hit = one_query(t.z[u][i], t.z[v][columns], good)
        ranks.append(rank)
        chance.append(sum(good) / len(good))
        for k in hits:
            hits[k].append(hit[k])
    count = len(ranks)
    figures = {f"R@{k}": sum(found) / count for k, found in hits.items()}
    return figures | {"median_rank": median(ranks), "chance": sum(chance) / count, "queries": count}


@pytest.mark.parametrize("by_label", [(), ("text",)])
def test_every_pair_equals_the_loop(by_label, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", 7 * 60)  # several blocks, the last one shorter
    t = table()
    found = scores(t, by_label)
    firsts = []
    for u, v in itertools.permutations(t.z, 2):
        wanted = slow(t, u, v, bool({u, v} & set(by_label)))
        firsts.append(wanted["R@1"])
        for name, value in wanted.items():
            assert found[f"retrieval/{u}-{v}/{name}"] == pytest.approx(value, abs=1e-6), (u, v, name)
    assert found["retrieval/mean/R@1"] == pytest.approx(sum(firsts) / len(firsts))
    assert 0.05 < found["retrieval/mean/R@1"] < 0.95


def test_rest_is_the_mean_of_the_other_views_that_are_there():
    t = table()
    mean = torch.stack([t.z["text"] * t.present["text"][:, None], t.z["sound"] * t.present["sound"][:, None]]).sum(0)
    there = t.present["text"] | t.present["sound"]
    with_rest = t._replace(z={**t.z, "rest": normalize(mean, dim=1)}, present={**t.present, "rest": there})
    found = scores(t)
    for name, value in slow(with_rest, "rest", "image", False).items():
        assert found[f"retrieval/rest-image/{name}"] == pytest.approx(value, abs=1e-6), name
    two = t._replace(z={v: t.z[v] for v in ("image", "text")})
    assert not any("rest" in name for name in scores(two))


def test_product_is_that_of_the_other_views_that_are_there():
    t = table()
    # Without signs a product points somewhere: else all of these views would be found by chance alone.
    t = t._replace(z={v: z.abs() for v, z in t.z.items()})
    there = t.present["text"] | t.present["sound"]
    rows = []
    for i in range(len(t.ids)):
        row = torch.ones(4)
        for v in ("text", "sound"):
            row = row * t.z[v][i] if t.present[v][i] else row
        rows.append(row / row.norm())
    with_product = t._replace(z={**t.z, "p": torch.stack(rows)}, present={**t.present, "p": there})
    found = dict(retrieval(t, SingleProcess(), CPU, ("image",), ("rest", "product")))
    for name, value in slow(with_product, "p", "image", True).items():
        assert found[f"retrieval/product-image/{name}"] == pytest.approx(value, abs=1e-6), name
    assert found["retrieval/rest-image/R@1"] != found["retrieval/product-image/R@1"]
    assert not any("product" in name for name in scores(t))


def test_products_of_many_views_keep_their_direction():
    n, views = 50, 20
    make = torch.Generator().manual_seed(0)
    z = normalize(torch.rand(n, 64, generator=make), dim=1)  # coordinates about 1/8: their product is about 1e-17
    columns = {f"v{i}": z for i in range(views)}
    full = {v: torch.ones(n, dtype=torch.bool) for v in columns}
    t = Table(columns, {}, torch.arange(n), full, torch.full((n,), -1))
    made = module.fused(t, "v0", "product").z["product"]
    expected = z.double().pow(views - 1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made.double(), expected, atol=1e-4, rtol=0)


def test_partly_tied_scores_are_expectations():
    t = table(30)
    for v in t.z:
        t.z[v][:] = t.z[v].round().clamp(-1, 1) + torch.tensor([1e-3, 0, 0, 0])
        t.z[v][:] = normalize(t.z[v], dim=1)
    found, wanted = scores(t), slow(t, "image", "sound", False)
    assert 0 < wanted["R@5"] < 1
    for name in ("R@1", "R@5", "R@10"):
        assert found[f"retrieval/image-sound/{name}"] == pytest.approx(wanted[name], abs=0.02), name


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_collapsed_encoder_scores_chance(noise):
    n = 500
    row = normalize(torch.randn(1, 64), dim=1)
    z = {v: normalize(row + noise * torch.randn(n, 64), dim=1) for v in ("image", "text")}
    full = {v: torch.ones(n, dtype=torch.bool) for v in z}
    found = scores(Table(z, {}, torch.arange(n), full, torch.full((n,), -1)))
    assert found["retrieval/image-text/R@1"] == pytest.approx(1 / n)
    assert found["retrieval/image-text/R@10"] == pytest.approx(10 / n)
    assert found["retrieval/image-text/chance"] == pytest.approx(1 / n)
    assert found["retrieval/image-text/median_rank"] == pytest.approx((n + 1) / 2)


def test_perfect_and_random_embeddings():
    n = 400
    z = normalize(torch.randn(n, 32), dim=1)
    full = {v: torch.ones(n, dtype=torch.bool) for v in ("a", "b")}
    perfect = scores(Table({"a": z, "b": z}, {}, torch.arange(n), full, torch.full((n,), -1)))
    assert perfect["retrieval/mean/R@1"] == 1 and perfect["retrieval/a-b/median_rank"] == 1
    other = normalize(torch.randn(n, 32), dim=1)
    chance = scores(Table({"a": z, "b": other}, {}, torch.arange(n), full, torch.full((n,), -1)))
    assert chance["retrieval/a-b/R@10"] < 0.08 and 120 < chance["retrieval/a-b/median_rank"] < 280


def test_broken_embeddings_score_no_hit_and_empty_pairs_nothing():
    t = table()
    t.z["image"][:] = torch.nan
    found = scores(t)
    assert math.isnan(found["retrieval/image-sound/R@1"]) and found["retrieval/text-sound/R@1"] > 0
    t = table()
    t.present["text"][:] = False
    found = scores(t)
    assert found["retrieval/text-image/queries"] == 0 and "retrieval/text-image/R@1" not in found
    assert found["retrieval/mean/R@1"] > 0


def on_rank(rank: int, n: int, by_label: tuple[str, ...]) -> dict[str, float]:
    from mvpretrain.distributed.collectives import ProcessGroup

    return dict(retrieval(table(n), ProcessGroup(), CPU, by_label))


@pytest.mark.parametrize(("n", "by_label"), [(61, ()), (60, ("text",)), (12, ())])
def test_ranks_share_the_work_and_agree(ranks, n, by_label):
    alone = scores(table(n), by_label)
    for found in ranks(2).run(on_rank, n, by_label):
        assert found == pytest.approx(alone, abs=1e-9)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mvpretrain.data.order import BLOCK, Mix, Order


@pytest.mark.parametrize("shuffle", [0, 1, 7, 20, 1000])
@pytest.mark.parametrize("counts", [[30], [3, 0, 5, 1], [0, 4, 4, 4, 4, 0], [1] * 25])
def test_every_epoch_has_every_sample_once(counts: list[int], shuffle: int) -> None:
    order, size = Order(counts, seed=3, shuffle=shuffle), sum(counts)
    found = order(np.arange(4 * size)).reshape(4, size)
    assert (np.sort(found) == np.arange(size)).all()
    rng = np.random.default_rng(0)
    for _ in range(20):  # entered anywhere, with gaps as between the rows of other ranks
        positions = np.sort(rng.integers(0, 4 * size, 9))
        again = Order(counts, seed=3, shuffle=shuffle)
        assert (again(positions) == found.ravel()[positions]).all()


def test_windows_hold_whole_shards_and_at_least_shuffle_samples() -> None:
    counts = [5, 9, 2, 14, 7, 3, 11, 6]
    order = Order(counts, seed=0, shuffle=16)
    shard_of = np.repeat(np.arange(8), counts)
    for epoch in range(5):
        shards, bounds = order.plan(epoch)
        assert sorted(shards) == list(range(8))
        place = 0
        for start, end in pairwise(bounds):
            inside = shards[start:end]
            length = sum(counts[s] for s in inside)
            assert length >= 16 and (end == 8 or length - counts[inside[-1]] < 16)  # the last takes up a short rest
            window = order(epoch * order.size + np.arange(place, place + length))
            assert set(shard_of[window]) == set(inside)
            place += length


def test_orders_differ_by_epoch_seed_and_source_and_stay_for_ever() -> None:
    def epoch(number: int, seed: int, source: int = 0) -> list[int]:
        return Order([5, 4, 3], seed, 6, source=source)(np.arange(12) + 12 * number).tolist()

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2), epoch(0, 1, source=1)]
    assert len({tuple(o) for o in orders}) == 4
    # Runs that are resumed under a later version must find their place again: never change these numbers.
    assert orders[:2] == [[1, 0, 3, 8, 7, 4, 5, 6, 11, 9, 10, 2], [6, 10, 3, 11, 8, 0, 4, 5, 1, 9, 2, 7]]


def test_permutations_are_uniform() -> None:
    places = np.zeros((12, 12))
    for seed in range(1200):
        places[np.arange(12), Order([5, 4, 3], seed, 100)(np.arange(12))] += 1
    assert abs(places - 100).max() < 45  # 4.5 standard deviations of a count


def test_sorted_classes_are_mixed() -> None:
    classes = np.repeat(np.arange(10), 100)
    one = classes[Order([1000], 0, 256)(np.arange(1000))].reshape(10, 100)
    assert min(len(set(batch)) for batch in one) == 10
    ten = classes[Order([100] * 10, 0, 256)(np.arange(1000))].reshape(10, 100)
    assert min(len(set(batch)) for batch in ten) >= 3


def test_replacement_draws_uniformly_from_everywhere() -> None:
    order = Order([300, 0, 700], 0, 16, replacement=True)
    found = order(np.arange(100_000))
    counts = np.bincount(found, minlength=1000)
    assert counts.min() > 50 and counts.max() < 150  # 5 standard deviations
    assert 0.60 < len(set(found[:1000])) / 1000 < 0.66  # 1 - 1/e
    again = Order([300, 0, 700], 0, 16, replacement=True)
    for start in [0, BLOCK - 3, 50_000, 17]:
        assert (again(np.arange(start, start + 9)) == found[start : start + 9]).all()


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_mixing_keeps_to_the_weights(mode: str) -> None:
    mix = Mix([3, 1, 6], seed=4, mode=mode)  # type: ignore[arg-type]
    rows = np.stack([mix.sources(step, 16) for step in range(2000)])
    shares = np.bincount(rows.ravel(), minlength=3) / rows.size
    assert np.allclose(shares, [0.3, 0.1, 0.6], atol=0.05 if mode == "batch" else 0.012)
    of_one_source = (rows == rows[:, :1]).all(axis=1).mean()
    assert of_one_source == 1 if mode == "batch" else of_one_source < 0.01
    assert (Mix([3, 1, 6], 4, mode).sources(77, 16) == rows[77]).all()  # type: ignore[arg-type]
    assert (Mix([1], 4).sources(5, 8) == 0).all()

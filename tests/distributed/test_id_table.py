"""The hash table against a dictionary."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.distributed.id_table import MAX_FILL, IdTable, owner_rank, splitmix64

EXTREMES = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63), 2**62])


def draw(seed: int, count: int, high: int = 2**63 - 1) -> torch.Tensor:
    return torch.randint(-high, high, (count,), generator=torch.Generator().manual_seed(seed))


def test_the_hash_is_splitmix64():
    whole = (1 << 64) - 1
    for key, found in zip(EXTREMES.tolist(), splitmix64(EXTREMES).tolist(), strict=True):
        x = key & whole
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        assert found & whole == x ^ (x >> 31)


@pytest.mark.parametrize("high", [2**63 - 1, 2000])  # keys that hardly repeat, and such that come again and again
def test_it_is_a_dictionary(high):
    table, known = IdTable(3, torch.float64), {}
    for step in range(12):
        keys = torch.cat([draw(step, 700, high), EXTREMES]).unique()
        rows = torch.randn(len(keys), 3, dtype=torch.float64)
        table.set(keys, rows)
        known |= dict(zip(keys.tolist(), rows.tolist(), strict=True))
        asked = torch.cat([draw(100 + step, 300, high), keys, keys[:50]])
        for key, row in zip(asked.tolist(), table.get(asked).tolist(), strict=True):
            assert row == known[key] if key in known else all(x != x for x in row)
    assert len(table) == len(known) <= MAX_FILL * len(table.keys)
    keys, rows = table.items()
    assert keys.tolist() == sorted(known) and rows.tolist() == [known[key] for key in sorted(known)]


def test_keys_that_want_one_slot_find_others():
    table, keys = IdTable(1), torch.arange(200_000)
    same = keys[(splitmix64(keys) & 1023) == 5][:150]  # of a table that has not grown yet
    assert len(same) == 150
    table.set(same, same[:, None].float())
    assert torch.equal(table.get(same)[:, 0], same.float()) and table.get(keys[:50]).isnan().sum() > 40


def test_nothing_in_nothing_out():
    table, none = IdTable(2), torch.empty(0, dtype=torch.int64)
    table.set(none, torch.empty(0, 2))
    assert len(table) == 0 and table.get(none).shape == (0, 2) and table.get(EXTREMES).isnan().all()
    assert table.items()[1].shape == (0, 2)


def test_owners_share_alike_and_slots_do_not_follow_them():
    keys = torch.arange(100_000)  # ids are often counted
    for ranks in (2, 3, 8):
        counts = owner_rank(keys, ranks).bincount(minlength=ranks)
        assert (counts - len(keys) / ranks).abs().max() < 6 * (len(keys) / ranks) ** 0.5
    mine = keys[owner_rank(keys, 8) == 3]
    slots = (splitmix64(mine) & 1023).bincount(minlength=1024)
    assert slots.min() > 0 and slots.max() < 3 * len(mine) / 1024 + 20


def test_memory_is_what_is_said():
    table = IdTable(2)
    table.set(torch.arange(100_000), torch.zeros(100_000, 2))
    assert table.nbytes == 17 * len(table.keys) and 17 / 0.7 < table.nbytes / 100_000 < 17 / 0.35

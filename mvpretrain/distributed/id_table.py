"""Rows of numbers by 64-bit key: an open-addressing hash table in tensors, without a declared size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_FILL = 0.7  # of all slots: beyond it, probes grow long and the table is doubled


class IdTable:
    """`columns` numbers for each key that was ever set; keys are any 64-bit integers, in any order.

    Linear probing, all keys of a call at once. Memory: 9 bytes and the numbers for each slot, of which 35 to 70 % are
    taken; half as much again while it is doubled. A key's slot depends on which keys came first, its numbers do not.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.columns, self.count = columns, 0
        self._allocate(1024, dtype, device)

    def _allocate(self, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.keys = torch.zeros(slots, dtype=torch.int64, device=device)
        self.taken = torch.zeros(slots, dtype=torch.bool, device=device)
        self.rows = torch.empty(slots, self.columns, dtype=dtype, device=device)

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.taken.nbytes + self.rows.nbytes

    def to(self, device: torch.device) -> None:
        self.keys, self.taken, self.rows = (x.to(device) for x in (self.keys, self.taken, self.rows))

    def get(self, keys: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """The keys' numbers, NaN where a key was never set; keys may repeat."""
        slots = self._probe(keys, claim=False)
        rows = self.rows[slots.clamp_min(0)]
        return rows.masked_fill((slots < 0)[:, None], torch.nan)

    def set(self, keys: Int[Tensor, " b"], rows: Float[Tensor, "b c"]) -> None:
        """Put numbers under keys, which must differ from one another."""
        if self.count + len(keys) > MAX_FILL * len(self.keys):
            self._grow(self.count + len(keys))
        self.rows[self._probe(keys, claim=True)] = rows.to(self.rows)

    def items(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n c"]]:
        """(all keys in ascending order, their numbers)."""
        keys = self.keys[self.taken]
        order = keys.argsort()
        return keys[order], self.rows[self.taken][order]

    def _probe(self, keys: Int[Tensor, " b"], claim: bool) -> Int[Tensor, " b"]:
        """The slot of each key; where a key is not there, -1, or with `claim` a slot that is now its own."""
        slots, found = splitmix64(keys) & (len(self.keys) - 1), torch.full_like(keys, -1)
        searching = torch.arange(len(keys), device=keys.device)
        while len(searching):
            at, wanted = slots[searching], keys[searching]
            taken = self.taken[at]
            if claim:
                # Several keys may want one slot: the last to write has it, and those that read another key go on.
                self.keys[at[~taken]] = wanted[~taken]
                self.taken[at] = True
                self.count += int((~taken & (self.keys[at] == wanted)).sum())
                taken = torch.ones_like(taken)
            hit = taken & (self.keys[at] == wanted)
            found[searching[hit]] = at[hit]
            searching = searching[taken & ~hit]
            slots[searching] = (slots[searching] + 1) & (len(self.keys) - 1)
        return found

    def _grow(self, least: int) -> None:
        """Move everything into the smallest table that has room for `least` keys."""
        keys, rows = self.keys[self.taken], self.rows[self.taken]
        slots = len(self.keys)
        while MAX_FILL * slots < least:
            slots *= 2
        self.count = 0
        self._allocate(slots, rows.dtype, rows.device)
        self.rows[self._probe(keys, claim=True)] = rows


def splitmix64(keys: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A hash of 64-bit integers, one to one: the finaliser of SplitMix64 (Steele et al. 2014); products wrap round."""
    for bits, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        keys = (keys ^ _unsigned_shift(keys, bits)) * factor
    return keys ^ _unsigned_shift(keys, 31)


def owner_rank(keys: Int[Tensor, " b"], ranks: int) -> Int[Tensor, " b"]:
    """The rank that holds each key: by the upper half of its hash, of which slots use the lower one."""
    return _unsigned_shift(splitmix64(keys), 32) % ranks


def _unsigned_shift(keys: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in: torch's own shift brings in the sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)

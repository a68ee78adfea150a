"""Rows of numbers by 64-bit key: an open-addressing hash table in tensors, without a declared size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_FILL = 0.7  # of all slots: beyond it, probes grow long and the table is doubled


class IdTable:
    """`columns` numbers for each key that was ever set; keys are any 64-bit integers, and come as they will.

    Linear probing, all keys of a call at once. Memory: 9 bytes and the numbers for each slot, of which 35 to 70 % are
    taken; half as much again while it is doubled. Where a key lies depends on who came first, what it holds does not.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.columns, self.count = columns, 0
        self._lay_out(1024, dtype, device)

    def _lay_out(self, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
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
        found = self._walk(keys, claim=False)
        rows = self.rows[found.clamp_min(0)]
        return rows.masked_fill((found < 0)[:, None], torch.nan)

    def set(self, keys: Int[Tensor, " b"], rows: Float[Tensor, "b c"]) -> None:
        """Put numbers under keys, which must differ from one another."""
        if self.count + len(keys) > MAX_FILL * len(self.keys):
            self._grow(self.count + len(keys))
        self.rows[self._walk(keys, claim=True)] = rows.to(self.rows)

    def items(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n c"]]:
        """(all keys in ascending order, their numbers)."""
        keys = self.keys[self.taken]
        order = keys.argsort()
        return keys[order], self.rows[self.taken][order]

    def _walk(self, keys: Int[Tensor, " b"], claim: bool) -> Int[Tensor, " b"]:
        """The slot of each key; where a key is not there, -1, or with `claim` a slot that is now its own."""
        slots, found = splitmix64(keys) & (len(self.keys) - 1), torch.full_like(keys, -1)
        looking = torch.arange(len(keys), device=keys.device)
        while len(looking):
            at, wanted = slots[looking], keys[looking]
            taken = self.taken[at]
            if claim:
                # Several keys may want one slot: the last to write has it, and those that read another key go on.
                self.keys[at[~taken]] = wanted[~taken]
                self.taken[at] = True
                self.count += int((~taken & (self.keys[at] == wanted)).sum())
                taken = torch.ones_like(taken)
            here = taken & (self.keys[at] == wanted)
            found[looking[here]] = at[here]
            looking = looking[taken & ~here]
            slots[looking] = (slots[looking] + 1) & (len(self.keys) - 1)
        return found

    def _grow(self, least: int) -> None:
        """Move everything into the smallest table that has room for `least` keys."""
        keys, rows = self.keys[self.taken], self.rows[self.taken]
        slots = len(self.keys)
        while MAX_FILL * slots < least:
            slots *= 2
        self.count = 0
        self._lay_out(slots, rows.dtype, rows.device)
        self.rows[self._walk(keys, claim=True)] = rows


def splitmix64(keys: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A bijection of 64-bit integers that takes neighbours far apart: SplitMix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        keys = (keys ^ _shifted(keys, shift)) * factor
    return keys ^ _shifted(keys, 31)


def owner_rank(keys: Int[Tensor, " b"], ranks: int) -> Int[Tensor, " b"]:
    """The rank that holds each key: by the upper half of its hash, of which slots use the lower one."""
    return _shifted(splitmix64(keys), 32) % ranks


def _shifted(keys: Tensor, by: int) -> Tensor:
    """Shift right, zeros coming in: torch's own repeats the sign."""
    return (keys >> by) & ((1 << (64 - by)) - 1)

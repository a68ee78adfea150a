"""Numbers by sample id, divided among the ranks: each holds the ids whose hash is its own, whoever asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.id_table import IdTable, owner_rank

FILES = "keyed-{}.safetensors"  # in a checkpoint, by rank


class SampleState(nn.Module):
    """`columns` numbers for every sample that was ever seen; of W ranks each holds one in W samples.

    All ranks see the ids of the whole batch already, so that `read` needs one message, a sum to which each id's owner
    contributes, and `write` none: every rank knows the new numbers, owners keep theirs. What is written is staged, and
    counts from the next `read` on, unless `discard` comes before it: a step that was not taken must not leave a trace.
    The numbers are no part of the state dict, which knows one rank only: `save` and `restore` go through files, of any
    number of ranks.

    Memory a rank for N samples: N / W times 9 bytes and the numbers, divided by the table's fill of 35 to 70 %.
    `device: false` keeps them in the machine's memory, whatever device the ids are on.
    """

    def __init__(self, columns: int, collectives: Collectives, device: bool = False):
        super().__init__()
        self.columns, self.collectives, self.on_device = columns, collectives, device
        self.table: IdTable | None = None
        self.staged: tuple[Tensor, Tensor] | None = None

    def read(self, ids: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "n c"]:
        """The numbers of the whole batch's ids, the same on every rank; NaN where an id is new. Of `like`'s type."""
        self.commit()
        if self.table is None:
            self.table = IdTable(self.columns, like.dtype, like.device if self.on_device else "cpu")
        elif self.on_device:
            self.table.to(like.device)
        ids = ids.to(self.table.keys.device)
        owned = self.owned(ids)
        rows = self.table.rows.new_zeros(len(ids), self.columns)
        rows[owned] = self.table.get(ids[owned])
        return self.collectives.sum(rows.to(like))  # zeros change no bit of the owner's numbers

    def write(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n c"]) -> None:
        """Stage the numbers of the whole batch's ids, by equal calls on every rank. Rows of one id must be equal."""
        self.commit()
        owned = self.owned(ids)
        known, index = ids[owned].unique(return_inverse=True)
        kept = rows.new_empty(len(known), self.columns)
        kept[index] = rows[owned].detach()
        self.staged = known, kept

    def discard(self) -> None:
        """Drop what was staged: the step that it belongs to was not taken."""
        self.staged = None

    def commit(self) -> None:
        """Take what was staged into the table."""
        if self.staged is not None:
            assert self.table is not None, "write comes after read"
            keys, rows = (x.to(self.table.keys.device) for x in self.staged)
            self.table.set(keys, rows)
            self.staged = None

    def items(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n c"]]:
        """(this rank's ids in ascending order, their numbers)."""
        self.commit()
        table = self.table or IdTable(self.columns)
        return table.items()

    def owned(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which ids this rank holds."""
        return owner_rank(ids, self.collectives.size) == self.collectives.rank

    def load(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n c"]) -> None:
        """Put in those of some saved numbers whose ids are this rank's."""
        owned = self.owned(ids)
        if self.table is None:
            self.table = IdTable(self.columns, rows.dtype)
        device = self.table.keys.device
        self.table.set(ids[owned].to(device), rows[owned].to(device))


def states_in(module: nn.Module) -> Iterator[tuple[str, SampleState]]:
    """(name, sample state) of every part of a module that has one."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, SampleState))


def discard(module: nn.Module) -> None:
    """Drop what the module's parts have staged."""
    for _, part in states_in(module):
        part.discard()


def save(module: nn.Module, folder: Path, rank: int) -> None:
    """Write this rank's numbers into `folder`, where there are any to keep."""
    tensors = {}
    for name, part in states_in(module):
        tensors[f"{name}/ids"], tensors[f"{name}/rows"] = (x.cpu().contiguous() for x in part.items())
    if tensors:
        save_file(tensors, folder / FILES.format(rank))


def restore(module: nn.Module, folder: Path) -> None:
    """Take this rank's ids of what any number of ranks has saved, in place of what the module holds.

    ValueError: numbers of another objective.
    """
    for _, part in states_in(module):
        part.table = part.staged = None
    for path in sorted(folder.glob(FILES.format("*"))):
        with safe_open(path, "pt") as file:
            for name, part in states_in(module):
                if f"{name}/ids" not in file.keys():  # noqa: SIM118  (no mapping)
                    raise ValueError(f"{path} holds no numbers for {name}; resume with the objective that it had")
                ids, rows = file.get_tensor(f"{name}/ids"), file.get_tensor(f"{name}/rows")
                if rows.shape[1] != part.columns:
                    raise ValueError(
                        f"{path} has {rows.shape[1]} numbers an id for {name}, this objective keeps {part.columns}; "
                        "resume with the objective that it had"
                    )
                part.load(ids, rows)

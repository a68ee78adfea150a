"""Numbers by sample id on real ranks: one copy of each, whoever asks, and the same after a change of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import ProcessGroup, SingleProcess
from mvpretrain.distributed.sample_state import SampleState

LIKE = torch.zeros(1, dtype=torch.float64)


def ids_of(step: int) -> Tensor:
    """Ids of a batch, some of them twice; -1 is one like any other."""
    ids = torch.randint(0, 40, (16,), generator=torch.Generator().manual_seed(step)) * 2**57 - 1
    ids[3] = ids[9] = ids[12]
    return ids


def counted(collectives: Any, steps: range, store: SampleState | None = None) -> SampleState:
    """Each visit adds 1 to the first number and the step to the second."""
    store = store or SampleState(2, collectives)
    for step in steps:
        ids = ids_of(step)
        store.write(ids, store.read(ids, LIKE).nan_to_num(nan=0.0) + torch.tensor([1.0, step]))
    return store


def wanted(steps: range) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for step in steps:
        for name in set(ids_of(step).tolist()):
            row = found.setdefault(name, [0.0, 0.0])
            found[name] = [row[0] + 1, row[1] + step]
    return found


def dictionary(store: SampleState) -> dict[int, list[float]]:
    ids, rows = store.items()
    return dict(zip(ids.tolist(), rows.tolist(), strict=True))


def on_ranks(rank: int, steps: range) -> dict[int, list[float]]:
    return dictionary(counted(ProcessGroup(), steps))


@pytest.mark.parametrize("size", [2, 4])
def test_each_id_has_one_owner_and_every_visit_counts(ranks, size):
    parts = ranks(size).run(on_ranks, range(6))
    whole = {name: row for part in parts for name, row in part.items()}
    assert whole == wanted(range(6)) and len(whole) == sum(map(len, parts))
    assert all(len(part) < len(whole) for part in parts)


def test_what_is_forgotten_was_never_there():
    store = counted(SingleProcess(), range(3))
    store.write(ids_of(3), torch.full((16, 2), 7.0, dtype=torch.float64))
    store.discard()
    assert dictionary(store) == wanted(range(3))


class Holder(nn.Module):
    def __init__(self, collectives: Any, columns: int = 2):
        super().__init__()
        self.inside = nn.ModuleList([SampleState(columns, collectives)])


def first(holder: Holder) -> SampleState:
    return next(part for _, part in sample_state.states_in(holder))


def saved(rank: int, folder: Path) -> None:
    holder = Holder(ProcessGroup())
    counted(ProcessGroup(), range(4), first(holder))
    sample_state.save(holder, folder, rank)


def gone_on(rank: int, folder: Path) -> dict[int, list[float]]:
    holder = Holder(ProcessGroup())
    counted(ProcessGroup(), range(90, 92), first(holder))  # what is there before goes
    sample_state.restore(holder, folder)
    return dictionary(counted(ProcessGroup(), range(4, 6), first(holder)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_two_ranks_save_and_any_number_goes_on(ranks, tmp_path, size):
    ranks(2).run(saved, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    parts = ranks(size).run(gone_on, tmp_path)
    whole = {name: row for part in parts for name, row in part.items()}
    assert whole == wanted(range(6)) and len(whole) == sum(map(len, parts))


def test_numbers_of_another_objective_are_refused(tmp_path):
    holder = Holder(SingleProcess())
    counted(SingleProcess(), range(2), first(holder))
    sample_state.save(holder, tmp_path, 0)
    with pytest.raises(ValueError, match=r"has 2 numbers an id for inside\.0, this objective keeps 3"):
        sample_state.restore(Holder(SingleProcess(), 3), tmp_path)
    other = nn.ModuleDict({"elsewhere": SampleState(2, SingleProcess())})
    with pytest.raises(ValueError, match="holds no numbers for elsewhere; resume with the objective that it had"):
        sample_state.restore(other, tmp_path)


def test_a_module_without_numbers_writes_no_file(tmp_path):
    sample_state.save(nn.Linear(2, 2), tmp_path, 0)
    sample_state.restore(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def read_everywhere(rank: int) -> tuple[list[float], list[bool]]:
    store = counted(ProcessGroup(), range(5))
    rows = store.read(torch.cat([ids_of(2), torch.tensor([12345])]), LIKE)
    return rows[:-1].flatten().tolist(), rows[-1].isnan().tolist()


def test_every_rank_reads_what_any_of_them_holds(ranks):
    known = wanted(range(5))
    flat = [x for name in ids_of(2).tolist() for x in known[name]]
    assert ranks(2).run(read_everywhere) == [(flat, [True, True])] * 2

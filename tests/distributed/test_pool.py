"""The pool of ranks itself: results in rank order, errors with their rank, and a fresh start after a hang."""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Callable

import pytest
import torch

from tests.ranks import CHECKED


def report(rank: int) -> tuple[int, int, str, int]:
    import torch.distributed as dist

    box = torch.tensor(rank)
    dist.all_reduce(box)
    return rank, dist.get_world_size(), os.environ["RANK"], int(box)


def process_id(rank: int) -> int:
    return os.getpid()


def fail_on(rank: int, bad: tuple[int, ...]) -> None:
    import torch.distributed as dist

    if rank in bad:
        raise ValueError(f"rank {rank} has nothing to say")
    dist.barrier()


def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def die(rank: int) -> None:
    os._exit(3)


def warn(rank: int) -> None:
    warnings.warn("old", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_come_in_rank_order(ranks, size):
    assert ranks(size).run(report) == [(r, size, str(r), size * (size - 1) // 2) for r in range(size)]


def test_processes_stay_between_calls(ranks):
    first = ranks(2).run(process_id)
    assert ranks(2).run(process_id) == first
    with pytest.raises(ValueError, match="nothing to say") as caught:
        ranks(2).run(fail_on, (0, 1))
    assert "in rank" in caught.value.__notes__[0] and "fail_on" in caught.value.__notes__[0]
    assert ranks(2).run(process_id) == first


def test_failure_of_one_rank_is_raised_and_the_others_are_replaced(ranks):
    first = ranks(2).run(process_id)
    with pytest.raises(ValueError, match="rank 1 has nothing"):
        ranks(2).run(fail_on, (1,))
    assert not set(ranks(2).run(process_id)) & set(first)


def test_hang_and_death_end_with_a_clear_message(ranks):
    with pytest.raises(TimeoutError, match=r"hang: no answer from rank \[1\] of 2 in 1 s"):
        ranks(2).run(hang, timeout=1)
    with pytest.raises(RuntimeError, match="of 2 died, exit code 3"):
        ranks(2).run(die)
    assert len(ranks(2).run(process_id)) == 2


def test_warnings_are_errors_in_ranks(ranks):
    with pytest.raises(DeprecationWarning, match="old"):
        ranks(2).run(warn)


def wrong_calls() -> dict[str, Callable[[], object]]:
    """By entry of CHECKED: a call with a tensor of a wrong shape or type, which nothing but the hook would refuse."""
    from mvpretrain.distributed import collectives, gather, id_table, sample_state
    from mvpretrain.model.health import spread
    from mvpretrain.objectives._settings import Temperature
    from mvpretrain.similarity.groups import classes
    from mvpretrain.transport.sinkhorn import solve

    single, flat = collectives.SingleProcess(), torch.ones(3)
    table, keys = flat[None], flat[None].long()
    return {
        "mvpretrain.similarity": lambda: classes(keys, keys[0]),
        "mvpretrain.transport": lambda: solve([flat, flat, flat], 0.1, [flat, flat, flat]),
        "mvpretrain.model": lambda: spread(flat),
        "mvpretrain.objectives": lambda: Temperature().bounded(table),
        "mvpretrain.distributed.collectives": lambda: collectives.Collectives.gather(single, flat[0]),  # type: ignore
        "mvpretrain.distributed.gather": lambda: gather.own_rows(flat, single),  # type: ignore[arg-type]
        "mvpretrain.distributed.sample_state": lambda: sample_state.SampleState(1, single).read(keys, flat),
        "mvpretrain.distributed.id_table": lambda: id_table.splitmix64(flat),
    }


def refusals(rank: int = 0) -> dict[str, str]:
    """By entry of CHECKED: what the wrong call raised."""
    found = {}
    for room, call in wrong_calls().items():
        try:
            call()
            found[room] = "nothing"
        except Exception as error:
            found[room] = type(error).__name__
    return found


def test_modules_of_a_folder_that_is_new_on_the_path_are_found(ranks, tmp_path, monkeypatch):
    ranks(2).run(process_id)
    (tmp_path / "late_module.py").write_text("def twice(rank, x):\n    return 2 * x + rank\n")
    monkeypatch.syspath_prepend(tmp_path)
    late = importlib.import_module("late_module")
    assert ranks(2).run(late.twice, 5) == [10, 11]


def test_each_room_is_taken_once_and_sees_a_wrong_shape_refused(ranks):
    for found in (refusals(), *ranks(2).run(refusals)):
        assert found == dict.fromkeys(CHECKED, "TypeCheckError")

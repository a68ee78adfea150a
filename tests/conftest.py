"""What every test stands on: shape checks at run time, one thread, and the session's pool of gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from mvpretrain.distributed.pool import Pool
from tests.ranks import check_shapes, pool_of

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks and workers share few cores
os.fsync = lambda fd: None  # waiting for the disk, 10 ms a file, shows nothing here
check_shapes()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Callable[[int], Pool]]:
    """`ranks(2).run(fn, *args)`: `fn(rank, *args)` on two real gloo ranks. They start at first use and stay."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        return pools.setdefault(size, pool_of(size, pytestconfig.getini("filterwarnings")))

    yield of
    for pool in pools.values():
        pool.close()

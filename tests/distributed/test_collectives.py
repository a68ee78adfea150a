"""Gather and sum on real ranks against autograd in one process, and whole tables through one packed gather."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.testing.tables import SPLITS, draw, leaves, part_of
from mvpretrain.types import Embeddings

# Ids that no float holds, the pattern of a signalling NaN among them.
IDS = torch.tensor([2**62 + 1, -(2**63), -1, 2**53 + 1, 0, 2**63 - 1, 0x7FA0_0001_7FA0_0001, -7, 3, 2**40, 11, 12])


def use(rank: int, gathered: Tensor) -> Tensor:
    """A function of the gathered rows that differs from rank to rank."""
    return (gathered * draw(10 + rank, *gathered.shape, dtype=gathered.dtype)).sum() + (gathered**2).sum() * (rank + 1)


def gather_on(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = draw(rank, *shape, dtype=dtype).requires_grad_()
    gathered = ProcessGroup().gather(x)
    use(rank, gathered).backward()
    assert x.grad is not None
    return gathered.detach(), x.grad


def sum_on(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = draw(rank, 3, 2, dtype=dtype).requires_grad_()
    total = ProcessGroup().sum(x)
    use(rank, total).backward()
    assert x.grad is not None
    return total.detach(), x.grad


def send_recv_on(rank: int) -> tuple[Tensor, list[float], int]:
    """The maximum, what came from each rank by shifts with two messages under way, and one table without z."""
    collectives = ProcessGroup()
    top = collectives.maximum(draw(rank, 3))
    coming = []
    for shift in range(collectives.size):
        to, source = (rank + shift) % collectives.size, (rank - shift) % collectives.size
        coming.append(
            collectives.send_recv(torch.tensor([10.0 * rank + to]), to, source) if shift else lambda: torch.zeros(1)
        )
    whole = table(torch.float32)
    _, gathered = gather_embeddings(
        part_of(whole, rank, collectives.size), collectives, gathers=lambda rows, dim: (rows, dim) != (7, 4)
    )
    return top, [float(c()) for c in coming], len(gathered.z) + 10 * int(gathered.present["a"].sum())


def largest_on(rank: int) -> tuple[int, int, int]:
    collectives = ProcessGroup()
    return collectives.rank, collectives.size, collectives.largest([7, -2, 2**40, 5][rank])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 3, 2), (1, 1)])
@pytest.mark.parametrize("size", [2, 4])
def test_gather_concatenates_and_its_backward_sums(ranks, size, shape, dtype):
    found = ranks(size).run(gather_on, dtype, shape)
    gathered = torch.cat([draw(r, *shape, dtype=dtype) for r in range(size)]).requires_grad_()
    torch.stack([use(r, gathered) for r in range(size)]).sum().backward()
    assert gathered.grad is not None
    for (rows, gradient), wanted in zip(found, gathered.grad.chunk(size)):
        assert torch.equal(rows, gathered.detach())
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [2, 4])
def test_sum_sums_and_so_does_its_backward(ranks, size, dtype):
    found = ranks(size).run(sum_on, dtype)
    parts = [draw(r, 3, 2, dtype=dtype).requires_grad_() for r in range(size)]
    total = torch.stack(parts).sum(0)
    torch.stack([use(r, total) for r in range(size)]).sum().backward()
    for (value, gradient), part in zip(found, parts):
        torch.testing.assert_close(value, total.detach())
        torch.testing.assert_close(gradient, part.grad)


def test_maximum_and_send_recv(ranks):
    wanted = torch.stack([draw(r, 3) for r in range(4)]).amax(0)
    for rank, (top, came, table) in enumerate(ranks(4).run(send_recv_on)):
        assert torch.equal(top, wanted)
        assert came[1:] == [10.0 * ((rank - shift) % 4) + rank for shift in (1, 2, 3)]
        assert table == 90  # 9 of 12 rows have the view, and no z came


def test_largest(ranks):
    assert ranks(2).run(largest_on) == [(0, 2, 7), (1, 2, 7)]
    assert ranks(3).run(largest_on) == [(r, 3, 2**40) for r in range(3)]


def table(dtype: torch.dtype) -> Embeddings:
    """Twelve samples in two views of different widths, each missing from some."""
    present = {"a": torch.arange(12) % 4 != 1, "b": torch.arange(12) % 5 != 2}
    z = {"a": normalize(draw(1, 12, 4, dtype=dtype), dim=1), "b": normalize(draw(2, 12, 3, dtype=dtype), dim=1)}
    return Embeddings(z, IDS, present, torch.arange(12) * 2**55 - 4)


def gather_embeddings_on(rank: int, size: int, dtype: torch.dtype) -> tuple[Embeddings, Embeddings, dict[str, Tensor]]:
    mine = part_of(table(dtype), rank, size)
    mine = leaves(mine)
    local, gathered = gather_embeddings(mine, ProcessGroup())
    torch.stack([use(rank, z) for z in gathered.z.values()]).sum().backward()
    local, gathered = (t._replace(z={v: z.detach() for v, z in t.z.items()}) for t in (local, gathered))
    return local, gathered, {v: z.grad for v, z in mine.z.items() if z.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gather_embeddings_brings_every_rank_the_same_whole_table(ranks, size, dtype):
    found = ranks(size).run(gather_embeddings_on, size, dtype)
    longest = max(SPLITS[size])
    wanted = [part_of(table(dtype), rank, size).pad(longest) for rank in range(size)]
    for rank, (local, gathered, _) in enumerate(found):
        assert_equal(local, wanted[rank])
        assert len(gathered.ids) == size * longest
        for other in range(size):
            assert_equal(gathered.rows(slice(other * longest, (other + 1) * longest)), wanted[other])
        real = torch.cat([torch.arange(longest) < n for n in SPLITS[size]])
        assert_equal(gathered.rows(real), table(dtype))
        assert not any(p[~real].any() for p in gathered.present.values())


@pytest.mark.parametrize("size", [2, 4])
def test_gradient_through_gather_embeddings_is_summed_over_ranks(ranks, size):
    found = ranks(size).run(gather_embeddings_on, size, torch.float64)
    longest = max(SPLITS[size])
    for v, whole in table(torch.float64).z.items():
        parts = [z.clone().requires_grad_() for z in whole.split(SPLITS[size])]
        gathered = torch.cat([torch.nn.functional.pad(z, (0, 0, 0, longest - len(z))) for z in parts])
        torch.stack([use(r, gathered) for r in range(size)]).sum().backward()
        for (_, _, gradients), part in zip(found, parts):
            torch.testing.assert_close(gradients[v], part.grad)


def assert_equal(found: Embeddings, wanted: Embeddings) -> None:
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.labels, wanted.labels)
    assert list(found.z) == list(wanted.z)
    for v in wanted.z:
        assert found.z[v].dtype == wanted.z[v].dtype and torch.equal(found.z[v], wanted.z[v])
        assert found.present[v].dtype == torch.bool and torch.equal(found.present[v], wanted.present[v])


def test_single_process_sends_nothing():
    whole, single = table(torch.float32), SingleProcess()
    assert isinstance(single, Collectives) and (single.rank, single.size) == (0, 1)
    local, gathered = gather_embeddings(whole, single)
    assert local is whole and gathered is whole
    assert single.gather(whole.ids) is whole.ids and single.sum(whole.ids) is whole.ids and single.largest(3) == 3

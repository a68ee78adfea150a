"""Bytes and FLOPs against numbers that can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mvpretrain import objectives
from mvpretrain.profiling import measure
from mvpretrain.profiling.measure import Live, Moment
from mvpretrain.types import Embeddings

CPU = torch.device("cpu")
D, WIDE = 16, 64


@pytest.mark.parametrize(("text", "count"), [
    ("40GiB", 40 * 2**30), ("40 gib", 40 * 2**30), ("1.5g", 3 * 2**29), ("500MB", 500_000_000), ("800MiB", 800 * 2**20),
    ("1e9", 10**9), ("123 b", 123), ("2TiB", 2**41), ("7k", 7 * 1024),
])  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert measure.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "40 parsecs", "-3GiB", "0", "40 G i B", "1,5GiB", "nan", "4GiBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory; write it as 40GiB"):
        measure.parse_bytes(text)


def test_bytes_for_people() -> None:
    assert measure.format_bytes(2**20 * 1.5) == "1.5 MiB" and measure.format_bytes(2**40) == "1,024.0 GiB"


class Blocks(nn.Module):
    """Residual-free blocks of two linear layers without bias; GELU between them."""

    def __init__(self, depth: int, checkpointed: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, WIDE, bias=False), nn.GELU(), nn.Linear(WIDE, D, bias=False))
            for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)  # type: ignore[assignment]
        return x


def curves(module: nn.Module, rows: int) -> tuple[list[Moment], list[Moment]]:
    """(forward, backward) on so many rows."""
    x = torch.randn(rows, D)
    module.zero_grad()
    with Live(CPU, module) as live:
        y = module(x)
        ended = len(live.curve)
        y.backward(torch.ones(rows, D))
    return live.curve[:ended], live.curve[ended:]


def test_what_autograd_keeps_and_what_gradients_take() -> None:
    rows, depth = 40, 3
    module = Blocks(depth)
    forward, backward = curves(module, rows)
    weights = 4 * 2 * D * WIDE * depth
    # Each block's product, its GELU, and its output, which is the next block's input; the first input was there.
    assert forward[-1] == Moment(4 * rows * depth * (2 * WIDE + D), 0)
    assert backward[-1].gradients == weights
    # What is alive at last: the gradients and the output, which y still holds; the cotangent too.
    assert backward[-1].live - weights in (4 * rows * D, 2 * 4 * rows * D)
    assert max(backward).live > forward[-1].live


def test_checkpointing_shows_as_inputs_of_blocks_and_one_block_at_a_time() -> None:
    rows, depth = 40, 3
    forward, backward = curves(Blocks(depth, checkpointed=True), rows)
    assert forward[-1].live == 4 * rows * (depth * D + WIDE)  # what the last product reads is not dropped yet
    assert max(forward).live <= 4 * rows * (depth * D + 2 * WIDE)
    plain, _ = curves(Blocks(depth), rows)
    assert max(m.live - m.gradients for m in backward) < plain[-1].live


def test_views_writes_in_place_and_the_dead_count_nothing() -> None:
    given = torch.zeros(100)
    with Live(CPU, nn.Linear(1, 1)) as live:
        given.view(10, 10)[2:].add_(1)
        assert live.live == 0
        fresh = given + 1
        _ = fresh[::2].t()
        assert live.live == 400
        del fresh
        assert live.live == 400  # the view is left
        del _
        assert live.live == 0
    assert [m.live for m in live.curve].count(400) >= 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_any_number_of_rows_follows_from_two(checkpointed: bool) -> None:
    module = Blocks(3, checkpointed)
    (few, few_back), (more, more_back), (wanted, wanted_back) = (curves(module, n) for n in (3, 5, 50))
    assert measure.stretched(few, more, (3, 5), 50) == wanted
    assert measure.stretched(few_back, more_back, (3, 5), 50) == wanted_back
    assert measure.stretched(few, more, (5, 5), 50) == more


def test_curves_of_other_operations_are_stretched_by_their_heights() -> None:
    few, more = [Moment(10, 0), Moment(30, 5), Moment(20, 9)], [Moment(40, 5)]
    assert measure.stretched(few, more, (1, 2), 5) == [Moment(70, 5)]


def test_flops_of_products_and_of_custom_functions() -> None:
    a, b = torch.randn(30, 20), torch.randn(20, 10, requires_grad=True)
    assert measure.flops(lambda: a @ b) == 2 * 30 * 20 * 10
    assert measure.flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 30 * 20 * 10
    n, d = 64, 32
    z = {v: nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for v in "uv"}
    present = {v: torch.ones(n, dtype=torch.bool) for v in z}
    table = Embeddings(z, torch.randperm(n), present, torch.full((n,), -1))
    objective = objectives.build({"kind": "infonce"}, list(z))

    def run() -> Any:
        objective(table, table).total.backward()

    assert 3 <= measure.flops(run) / (2 * n * n * d) < 4.5  # a product forward, two or three backward


def test_flops_of_products_in_place() -> None:
    a, b, out = torch.randn(30, 20), torch.randn(20, 10), torch.zeros(30, 10)
    assert measure.flops(lambda: out.addmm_(a, b)) == 2 * 30 * 20 * 10


def test_the_counter_allows_what_gradcache_does() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    layer = nn.Linear(4, 4)
    assert measure.flops(lambda: torch.autograd.grad(layer(x).sum(), x)) > 0


def test_the_machine() -> None:
    before = measure.peak(CPU)
    assert before >= measure.resident() > 2**20
    block = torch.ones(40 * 2**18)  # 40 MiB
    grown = measure.peak(CPU) - measure.resident()
    assert measure.resident() >= block.nbytes and grown >= 0
    assert 0 < measure.room(CPU, 2) * 2 <= measure.room(CPU, 1) * 1.1
    assert 1e8 < measure.matrix_rate(CPU, "fp32", seconds=0.01) < 1e13

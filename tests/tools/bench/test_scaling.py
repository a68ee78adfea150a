"""tools/bench/scaling.py: the model's terms against counting by hand, and the fit against a machine made up."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tool() -> Any:
    return importlib.import_module("tools.bench.scaling")


def test_costs_of_objectives(tool: Any) -> None:
    work = tool.Work(rows=100, views=3, dim=64, parameters=1000)
    pairs, b, n, d = 3, 100, 400, 64
    assert tool.objective_flops("infonce", work, 4) == 2 * pairs * 4 * b * n * d
    assert tool.objective_flops("sogclr", work, 4) == 2 * tool.objective_flops("infonce", work, 4)
    assert tool.objective_flops("m3g", work, 4) == 18 * 2 * n**3 / 4
    table = 4 * n * d * 3
    assert sorted(tool.messages("infonce", work, 4))[-2:] == [table, table]
    assert tool.messages("sogclr", work, 4) == [table, 8 * n * 3]
    assert len(tool.messages("m3g", work, 4)) == 2 + 2 * 3 + 200
    with pytest.raises(ValueError, match="three views, got 2"):
        tool.objective_flops("m3g", work._replace(views=2), 4)


def test_order_of_growth(tool: Any) -> None:
    """Per rank and doubling of ranks at the same rows: pairwise 2, m3g 4; state is scalars beside the tables."""
    work = tool.Work(rows=64, views=3, dim=256, parameters=1000)
    for kind, factor in (("infonce", 2), ("sogclr", 2), ("m3g", 4)):
        assert tool.objective_flops(kind, work, 64) / tool.objective_flops(kind, work, 32) == factor
    table, scalars = tool.messages("sogclr", work, 64)
    assert scalars / table == 2 / 256
    assert tool.held("m3g", work, 64) > 1.9 * tool.held("m3g", work, 32)


def test_a_step_by_hand(tool: Any) -> None:
    machine = tool.Machine(rate=1e9, products=1e9, bandwidth=1e6, latency=0.25, hidden=0.5)
    work = tool.Work(rows=10, views=2, dim=5, parameters=1_000_000, flops=3e8)
    assert tool.all_gather(8e6, 8, machine) == 3 * 0.25 + 7
    found = tool.parts("sogclr", work, 8, machine)
    assert found.towers == 3.0
    assert found.objective == pytest.approx(16 * 10 * 80 * 5 / 1e9)
    gathered = (4 * 80 * 5 * 2 + 8 * 80 * 2) * 7 / 8 / 1e6
    assert found.gather == pytest.approx(2 * 3 * 0.25 + gathered)
    reduction = 2 * (0.75 + 4e6 * 7 / 8 / 1e6)
    assert found.reduce == pytest.approx(reduction - 0.5 * 2.0)
    assert found.step == pytest.approx(sum(found)) and found.efficiency == pytest.approx(3 / found.step)
    one = tool.parts("infonce", work, 1, machine)
    assert one.gather == 0 and one.reduce == 0 and one.efficiency > 0.99


def test_where_scaling_stops(tool: Any) -> None:
    machine = tool.Machine(rate=4e14, products=4e14, bandwidth=5e10, latency=1e-5, hidden=1.0)
    work = tool.Work(rows=512, views=3, dim=512, parameters=10**8, flops=4e10)
    sizes = [2**i for i in range(3, 13)]
    stops = {kind: tool.limit(kind, work, machine, sizes) for kind in tool.KINDS}
    assert stops["m3g"] < stops["infonce"] <= stops["sogclr"]
    before = tool.parts("m3g", work, stops["m3g"] // 2, machine)
    assert not before.stopped and tool.parts("m3g", work, stops["m3g"], machine).stopped
    assert tool.limit("infonce", work._replace(flops=1e14), machine, sizes) is None
    half = tool.Parts(towers=5.0, objective=1.0, gather=1.0, reduce=3.5)
    assert half.stopped and not half._replace(reduce=2.9).stopped
    assert tool.Parts(towers=5.0, objective=3.0, gather=2.5, reduce=0.0).stopped


def made_up(tool: Any, ranks: int, rows: int, work: Any) -> Any:
    """A run of a machine with two cores that obeys the model exactly."""
    crowded, n = max(1, ranks / 2), rows * ranks
    there = 4 * n * work.dim * work.views * (ranks - 1) / ranks
    return tool.Run(ranks, rows, {
        "data": 0.25 * rows * crowded,
        "encode": 3.0 * rows * crowded,
        "gather": (0.5 * (ranks - 1) + 2e-5 * there) if ranks > 1 else 0.0,
        "objective": (1.5 + 1e-7 * 8 * rows * n * work.dim) * crowded + 0.2 * (ranks - 1),
        "backward": 6.0 * rows * crowded + 1e-6 * 8 * work.parameters * (ranks - 1) / ranks,
        "optimizer": 7.0 * crowded,
        "rest": 0.125 * crowded,
    })  # fmt: skip


def test_the_fit_finds_a_machine_again(tool: Any) -> None:
    work = tool.Work(rows=0, views=2, dim=128, parameters=3_000_000)
    runs = [made_up(tool, ranks, rows, work) for ranks in (1, 2, 4) for rows in (16, 32)]

    def describe(run: Any) -> dict[str, dict[str, float]]:
        return tool.terms(run, work, "infonce", cores=2)

    fit = tool.fitted(runs, describe)
    assert fit["encode"]["a row"] == pytest.approx(3.0, rel=1e-6)
    assert fit["backward"] == {"a row": pytest.approx(6.0, rel=1e-4), "a reduced byte": pytest.approx(1e-6, rel=1e-3)}
    assert fit["gather"] == {"a message": pytest.approx(0.5, rel=1e-4), "a byte": pytest.approx(2e-5, rel=1e-4)}
    assert fit["objective"]["a FLOP"] == pytest.approx(1e-7, rel=1e-3)
    unseen = made_up(tool, 8, 48, work)
    guess = tool.predicted(fit, describe(unseen))
    assert sum(guess.values()) == pytest.approx(sum(unseen.milliseconds.values()), rel=1e-3)


def test_noise_gives_no_negative_costs(tool: Any) -> None:
    work = tool.Work(rows=0, views=2, dim=128, parameters=3_000_000)
    runs = [made_up(tool, ranks, rows, work) for ranks in (1, 2, 4) for rows in (16, 32)]
    for i, run in enumerate(runs):
        for phase in run.milliseconds:
            run.milliseconds[phase] *= 1 + 0.3 * math.sin(10 * i + len(phase))
    fit = tool.fitted(runs, lambda run: tool.terms(run, work, "infonce", cores=2))
    assert all(value >= 0 for own in fit.values() for value in own.values())


def test_the_table_on_paper(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--paper-only"]) == 0
    out = capsys.readouterr().out
    assert "nothing measured" in out and "assumed: towers at 400 TFLOP/s" in out and "  4096" in out
    assert all(f"{kind} s" in out for kind in tool.KINDS)
    with pytest.raises(SystemExit):
        tool.main([])

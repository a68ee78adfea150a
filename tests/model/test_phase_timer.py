"""Time by phase: sums, means over steps, and what it costs."""

from __future__ import annotations

import time

import pytest
import torch

from mvpretrain.model.phase_timer import PHASES, PhaseTimer


@pytest.fixture
def spend(monkeypatch):
    """`spend(seconds)` moves the clock on."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def by(seconds: float) -> None:
        clock[0] += seconds

    return by


def test_phases_add_up_and_are_means_over_steps(spend):
    timer = PhaseTimer()
    for _ in range(2):
        for _ in range(3):
            with timer("encode"):
                spend(0.002)
        with timer("backward"):
            spend(0.01)
        spend(7)
        timer.step()
    figures = timer.figures()
    assert tuple(figures) == PHASES
    assert figures == pytest.approx({**dict.fromkeys(PHASES, 0), "encode": 6, "backward": 10})  # milliseconds


def test_asking_starts_anew(spend):
    timer = PhaseTimer()
    assert timer.figures() == dict.fromkeys(PHASES, 0.0)
    with timer("data"):
        spend(0.001)
    assert timer.count == 0 and timer.figures()["data"] == pytest.approx(1)  # the sum, where no step is over
    assert timer.figures() == dict.fromkeys(PHASES, 0.0)
    timer.step()
    assert timer.count == 1 and timer.figures()["data"] == 0 and timer.count == 0


def test_a_phase_that_fails_counts_and_an_unknown_one_is_refused(spend):
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer("gather"):
        spend(0.001)
        raise RuntimeError
    assert timer.figures()["gather"] == pytest.approx(1)
    with pytest.raises(KeyError):
        timer("forward")


class Event:
    """A GPU's event by a clock that the test moves on."""

    clock, passed = 0.0, 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.passed

    def synchronize(self) -> None:
        Event.passed = max(Event.passed, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "read before the device was there"
        return end.at - self.at


def test_events_are_read_when_the_device_has_passed_them_and_used_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PhaseTimer(torch.device("cuda"))
    for _ in range(4):
        for phase in ("encode", "backward"):
            with timer(phase):
                Event.clock += 10 if phase == "encode" else 1
        timer.step()
        Event.passed = Event.clock - 11  # the host is one step ahead
    assert len(timer._pending) == 4 and len(timer._free) == 4  # of two steps each
    figures = timer.figures()
    assert figures["encode"] == 10 and figures["backward"] == 1 and not timer._pending


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_is_timed_without_being_waited_for():
    device = torch.device("cuda")
    timer, x = PhaseTimer(device), torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with timer("encode"):
        for _ in range(50):
            x = x @ x * 1e-2
    ahead = 1000 * (time.perf_counter() - begin)
    timer.step()
    torch.cuda.synchronize()
    took = 1000 * (time.perf_counter() - begin)
    assert ahead < took / 2 and timer.figures()["encode"] == pytest.approx(took, rel=0.3)

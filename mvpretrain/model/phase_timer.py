"""Where a step's time goes, by phase: always on, at the price of two readings of a clock."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

PHASES: tuple[str, ...] = ("data", "encode", "gather", "objective", "backward", "optimizer")


class PhaseTimer:
    """Mean milliseconds a step by phase: `with timer("encode"): ...`, `timer.step()`, `timer.figures()`.

    A phase may be entered several times a step; its parts add up. On CPUs it is the process's wall time. On GPUs it
    is what the device spent between two events on its current stream, which nobody waits for before `figures`: the host
    runs ahead, and `data` is then the time for which the device had nothing else to do.
    """

    def __init__(self, device: torch.device = torch.device("cpu")):  # noqa: B008
        self.device = device
        self.count = 0  # steps since the last call of `figures`
        self._milliseconds = dict.fromkeys(PHASES, 0.0)
        self._phases = {name: _Phase(self, name) for name in PHASES}
        self._pending: deque[tuple[str, Any, Any]] = deque()  # phase, event before, event after
        self._free: list[Any] = []  # events to use again

    def __call__(self, phase: str) -> _Phase:
        """The context in which time counts as this phase's, one of PHASES."""
        return self._phases[phase]

    def step(self) -> None:
        """A step is over."""
        self.count += 1
        while self._pending and self._pending[0][2].query():  # reading those that the device has passed costs no wait
            self._read()

    def figures(self) -> dict[str, float]:
        """Mean milliseconds a step by phase since the last call of `figures`; the sums, where no step was counted."""
        if self._pending:
            self._pending[-1][2].synchronize()
        while self._pending:
            self._read()
        found = {name: total / max(self.count, 1) for name, total in self._milliseconds.items()}
        self.count, self._milliseconds = 0, dict.fromkeys(PHASES, 0.0)
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, phase: str, begin: Any, end: Any) -> None:
        if isinstance(begin, float):
            self._milliseconds[phase] += 1000 * (end - begin)
        else:
            self._pending.append((phase, begin, end))

    def _read(self) -> None:
        phase, begin, end = self._pending.popleft()
        self._milliseconds[phase] += begin.elapsed_time(end)
        self._free += [begin, end]


class _Phase:
    """Made once and entered often: a generator's context costs three times as much."""

    def __init__(self, timer: PhaseTimer, name: str):
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.begin = self.timer._now()

    def __exit__(self, *_: object) -> None:
        self.timer._add(self.name, self.begin, self.timer._now())

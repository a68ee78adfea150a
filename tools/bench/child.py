"""One side of a benchmark in a process of its own: to start it, to answer from it, and the memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from mvpretrain.profiling.measure import peak, resident

MARK = "@ "  # begins the line of the answer


def ask(tool: str, arguments: Sequence[str], ranks: int = 1) -> Any:
    """The answer of `python -m TOOL ARGUMENTS`, or of that many gloo ranks of it.

    SystemExit, with the end of what it said: it ended without an answer.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise SystemExit(f"{tool} {' '.join(arguments)} did not finish (out of memory?):\n{done.stderr[-2000:]}")


def answer(figures: Any) -> NoReturn:
    """In the child: give rank 0's figures to `ask` and end the process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{MARK}{json.dumps(figures)}")
    sys.stdout.flush()
    os._exit(0)  # torch with gloo sometimes aborts in the interpreter's own shutdown


class Memory:
    """The most bytes since this was made, above those that there were: resident pages, or tensors on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            # glibc keeps what is freed, and a peak of before would hide this one's.
            ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # not every system allows it
                Path("/proc/self/clear_refs").write_text("5")
            self.before = resident()

    def peak(self) -> int:
        return peak(self.device) - self.before

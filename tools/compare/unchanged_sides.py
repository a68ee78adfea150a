"""The two states of the package that `unchanged` holds against each other, and how to run a command in both at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 1800.0  # seconds that one command may take, on a busy machine too

# An editable install also finds submodules that a tree lacks, in the tree that is installed: neither side may see them.
HOOK = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


class Side(NamedTuple):
    """One state of the package: a tree of sources, and the folder that its results go to."""

    name: str
    tree: Path
    folder: Path
    hook: Path  # a folder with the start-up file of its processes

    def environment(self, **more: str) -> dict[str, str]:
        """That of a process which finds this side's package and computes on one thread of the CPU."""
        path = os.pathsep.join([str(self.hook), str(self.tree)])
        ours = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        return {**kept, **ours, **more}


class Job(NamedTuple):
    """A process to start: what it is called, on which side, where, and with what."""

    name: str
    side: Side
    command: Sequence[str]
    folder: Path
    more: dict[str, str] = {}


@contextmanager
def sides(ref: str, folder: Path) -> Iterator[tuple[Side, Side]]:
    """(the state at `ref`, checked out into `folder` for the time being; this tree as it is, saved or not)."""
    hook, tree = folder / "hook", folder / "then-tree"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    git("worktree", "add", "--detach", str(tree), ref)
    try:
        both = Side("then", tree, folder / "then", hook), Side("now", ROOT, folder / "now", hook)
        for side in both:
            side.folder.mkdir()
        yield both
    finally:
        git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> str:
    """What git says in this tree. ValueError: it refuses."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def run(jobs: Sequence[Job]) -> None:
    """Run all of them at the same time. RuntimeError: one failed or took too long, with the end of what it said."""
    started: list[tuple[Job, subprocess.Popen[bytes], Path]] = []
    try:
        for i, job in enumerate(jobs):
            said = job.side.folder / f"{job.name.replace(' ', '-')}-{i}.log"
            with said.open("wb") as file:
                environment = job.side.environment(**job.more)
                process = subprocess.Popen(
                    job.command, cwd=job.folder, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            started.append((job, process, said))
        wait(started)
    finally:
        for _, process, _ in started:
            if process.poll() is None:
                process.terminate()
                process.wait()


def wait(started: Sequence[tuple[Job, subprocess.Popen[bytes], Path]]) -> None:
    until = time.monotonic() + LONGEST
    left = list(started)
    while left:
        for one in [x for x in left if x[1].poll() is not None]:
            left.remove(one)
            job, process, said = one
            if process.returncode:
                ending = "\n".join(said.read_text(errors="replace").splitlines()[-25:])
                raise RuntimeError(f"{job.name} ({job.side.name}) ended with code {process.returncode}:\n{ending}")
        if left and time.monotonic() > until:
            raise RuntimeError(f"{left[0][0].name} ({left[0][0].side.name}) took longer than {LONGEST:g} s")
        time.sleep(0.1)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]

"""Processes joined by gloo that run functions sent to them: real ranks for tests and for `mvpretrain.testing`."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from typing import Any

GRACE = 2.0  # seconds that ranks have to answer once another one has failed: they may wait for it in a collective


class Pool:
    """`size` processes joined by gloo: `run(fn, *args)` calls `fn(rank, *args)` in each, and returns results by rank.

    `fn` is a function at the top of a module; arguments and results are pickled. The ranks start at the first call and
    stay. `set_up()`, also at the top of a module, is called in each before torch.distributed is initialised. Modules in
    `preload` are imported once for all ranks. An exception in a rank is raised here with that rank's traceback. Ranks
    that do not answer within `timeout` seconds are killed (TimeoutError), and the next call starts new ones.
    A script that uses a pool does so under `if __name__ == "__main__":`, since the ranks import it again.
    """

    def __init__(self, size: int, set_up: Callable[[], None] | None = None, preload: Sequence[str] = ("torch",)):
        self.size, self.set_up, self.preload = size, set_up, preload
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []
        self.folder: tempfile.TemporaryDirectory | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        if not self.processes or not all(p.is_alive() for p in self.processes):
            self.close()
            self._start()
        call = pickle.dumps((sys.path, pickle.dumps((fn, args))))  # modules of fn and args are found by this path
        for pipe in self.pipes:
            pipe.send_bytes(call)
        answers = self._collect(timeout)
        failures = [error for error, _ in answers.values() if error is not None]  # the first is the cause of the others
        if len(answers) < self.size or len(failures) not in (0, self.size):
            self.close()  # the ranks are at different calls of the program: their collectives no longer match
        if failures:
            raise failures[0]
        if len(answers) < self.size:
            silent = sorted(set(range(self.size)) - set(answers))
            raise TimeoutError(
                f"{fn.__name__}: no answer from rank {silent} of {self.size} in {timeout:g} s; pool killed"
            )
        return [answers[rank][1] for rank in range(self.size)]

    def _collect(self, timeout: float) -> dict[int, tuple[Exception | None, Any]]:
        """What each rank answered, (error, result), until all have or the time is over."""
        answers: dict[int, tuple[Exception | None, Any]] = {}
        until = time.monotonic() + timeout
        while len(answers) < self.size and (left := until - time.monotonic()) > 0:
            waiting = [r for r in range(self.size) if r not in answers]
            ready = connection.wait([self.pipes[r] for r in waiting], left)
            for rank in (r for r in waiting if self.pipes[r] in ready):
                answers[rank] = self._answer(rank)
                if answers[rank][0] is not None:
                    until = min(until, time.monotonic() + GRACE)
        return answers

    def _answer(self, rank: int) -> tuple[Exception | None, Any]:
        try:
            error, text, result = pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self.processes[rank].join()
            return RuntimeError(f"rank {rank} of {self.size} died, exit code {self.processes[rank].exitcode}"), None
        if error is not None:
            error.add_note(f"in rank {rank} of {self.size}:\n{text}")
        return error, result

    def _start(self) -> None:
        # One server imports torch and forks the ranks, so that they need not spend 3 s each on it.
        context = get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, environment, self.folder.name, self.set_up))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let idle ranks leave and kill those that are stuck."""
        for pipe in self.pipes:
            pipe.close()
        until = time.monotonic() + 1
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.pipes, self.folder = [], [], None


def _serve(
    pipe: connection.Connection, environment: dict[str, Any], folder: str, set_up: Callable[[], None] | None
) -> None:
    """A rank's life: join the others, answer calls until the pipe closes, leave without the interpreter's exit."""
    os.environ.update({name: str(value) for name, value in environment.items()}, OMP_NUM_THREADS="1")
    if set_up is not None:
        set_up()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, OSError):
            # gloo's threads sometimes abort a process that ends the ordinary way, after all its work is done.
            os._exit(0)
        torch.manual_seed(0)
        pipe.send_bytes(_answer_to(call, rank))


def _answer_to(call: bytes, rank: int) -> bytes:
    """(error, its traceback, result) of one call, pickled."""
    try:
        with warnings.catch_warnings():
            path, call = pickle.loads(call)
            if path != sys.path:
                sys.path[:] = path
                importlib.invalidate_caches()
            fn, args = pickle.loads(call)
            return pickle.dumps((None, "", fn(rank, *args)))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(answer := pickle.dumps((error, text, None)))
            return answer
        except Exception:
            return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text, None))

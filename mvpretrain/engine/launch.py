"""The processes of a run: what the launcher started, what the recipe asked for, and a refusal where they differ."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.engine.settings import EngineConfig


class Resolved(NamedTuple):
    """The engine's settings and what the launcher said, with nothing `auto` any more."""

    kind: str
    precision: str
    device: torch.device
    rank: int
    size: int
    threads: int | None = None  # for torch in this process; None: what torch chose, at most the rank's share of cores


class World(NamedTuple):
    """The processes of a run that have joined."""

    kind: str
    precision: str
    device: torch.device
    rank: int
    size: int
    collectives: Collectives


def resolve(config: EngineConfig) -> Resolved:
    """Decide kind, precision, device, rank and size from the settings and the launcher's environment.

    Call it once a run, before `start`: a process group that is waited for in vain costs minutes.

    ValueError: a combination that cannot work, or that the launcher contradicts.
    """
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = config.kind if config.kind != "auto" else ("none" if size == 1 else "ddp")
    wants_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local) if wants_gpu else torch.device("cpu")
    precision = config.precision if config.precision != "auto" else ("bf16" if wants_gpu else "fp32")
    if config.ranks and size != config.ranks:
        raise ValueError(
            f"engine.ranks={config.ranks}, but the launcher started {size} process(es); start it as "
            f"`torchrun --nproc-per-node {config.ranks} -m mvpretrain train ...`, or set engine.ranks={size}"
        )
    if kind == "none" and size > 1:
        raise ValueError(f"engine.kind=none is one process, the launcher started {size}; set engine.kind=ddp or zero2")
    if wants_gpu and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda, but torch sees no GPU; set engine.device=cpu")
    if precision == "fp16" and not wants_gpu:
        raise ValueError("engine.precision=fp16 needs a GPU; set engine.precision=bf16 or fp32")
    if config.offload and kind not in ("zero1", "zero2", "zero3"):
        raise ValueError(f"engine.offload moves ZeRO's part of the optimiser; kind={kind} has none, set zero1 to zero3")
    if config.options and not kind.startswith("zero"):
        raise ValueError(f"engine.options are DeepSpeed's, engine.kind={kind} does not use it; set zero0 to zero3")
    _refuse_contradiction(kind, precision)
    return Resolved(kind, precision, device, rank, size, config.threads)


def _refuse_contradiction(kind: str, precision: str) -> None:
    """`accelerate launch` passes its own wishes on by environment; the recipe decides, and both must agree."""
    environment = os.environ.get
    if environment("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch asked for FSDP, which is not supported; use --multi_gpu or --use_deepspeed")
    if environment("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = environment("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if not kind.startswith("zero") or (stage is not None and kind != f"zero{stage}"):
            raise ValueError(
                f"accelerate launch asked for DeepSpeed{f' ZeRO-{stage}' if stage else ''}, the recipe for "
                f"engine.kind={kind}; set engine.kind=zero{stage or 2} or start without --use_deepspeed"
            )
    mixed = environment("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", precision):
        raise ValueError(
            f"accelerate launch asked for {mixed}, the recipe for engine.precision={precision}; make them agree"
        )


def start(resolved: Resolved) -> World:
    """Join the ranks that the launcher started, and set this process's threads.

    ValueError: fewer ranks came than were announced.
    """
    kind, precision, device, rank, size, _ = resolved
    threads = resolved.threads or _threads()
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else Accelerate sets the threads by a rule of its own
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
    elif kind.startswith("zero") and not dist.is_initialized():
        # DeepSpeed needs a group even for one process, and asks the environment for what launchers put there.
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    found = dist.get_world_size() if dist.is_initialized() else 1
    if found != size:
        raise ValueError(f"{size} processes were announced, {found} are in the process group; check the launcher")
    return World(kind, precision, device, rank, size, ProcessGroup() if size > 1 else SingleProcess())


def _threads() -> int:
    """What torch chose, but not more than this machine's cores divided by the ranks on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // local))


def shutdown(code: int) -> None:
    """End this process after its last collective."""
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            if code == 0:
                dist.barrier()
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # With gloo, torch 2.14 sometimes aborts in the interpreter's own shutdown, and launchers then report a failure.
    os._exit(code)

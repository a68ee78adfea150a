"""Ranks, devices, precision, the step, and its state on disk: Accelerate and DeepSpeed live here and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from mvpretrain.engine.launch import Resolved, World, resolve, shutdown, start
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.engine.step import Engine, Step, encoding, encoding_modules, reduce_status
from mvpretrain.model.task import Task

__all__ = ["Engine", "Resolved", "Step", "World", "encoding", "reduce_status", "resolve", "shutdown", "start", "wrap"]


def wrap(world: World, task: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, batch: int) -> Engine:
    """A module, `forward(batch) -> Losses`, under the engine that the settings ask for; `batch` is the global one.

    What else a module may have: Timed, HasTowers and HasTeacher in engine/step.py. Micro-batches need a Task.

    ValueError: a batch that does not divide over the ranks, a parameter that the engine cannot hold, micro-batches of
    another module.
    """
    if batch % world.size or batch < world.size:
        raise ValueError(f"batch={batch} does not divide over {world.size} ranks; make it a multiple of {world.size}")
    if config.micro_batch and not isinstance(task, Task):
        raise ValueError(
            f"engine.micro_batch={config.micro_batch} works on a contrastive Task in two passes, not on a "
            f"{type(task).__name__}; set engine.micro_batch=null"
        )
    prepare(task, config, world.kind)
    # Imported here, since each brings a library that takes seconds to load.
    if world.kind.startswith("zero"):
        from mvpretrain.engine.deepspeed import Zero

        return Zero(world, task, optimizer, config, batch)
    from mvpretrain.engine.accelerate import Accelerated

    return Accelerated(world, task, optimizer, config)


def prepare(task: nn.Module, config: EngineConfig, kind: str) -> None:
    """Lay out the weights and compile what encodes, where the settings ask for it. ValueError: the engine cannot."""
    if config.channels_last:
        if kind.startswith("zero"):
            raise ValueError(
                f"engine.channels_last with engine.kind={kind}: DeepSpeed cannot hold such weights; use ddp"
            )
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        if kind == "zero3":
            raise ValueError("engine.compile with engine.kind=zero3: weights are not there when it traces; use zero2")
        for module in encoding_modules(task):
            module.compile()

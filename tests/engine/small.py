"""Small tasks, batches and engines that the engine's tests run on one process or on the pool's ranks."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, cast

import torch
from torch import Tensor

from mvpretrain import objectives
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.engine.optimizer import OptimizerConfig, build_optimizer
from mvpretrain.model.heads import HeadConfig
from mvpretrain.model.task import Task
from mvpretrain.model.teacher import TeacherConfig
from mvpretrain.model.tower import Tower, TowerConfig
from mvpretrain.types import Batch, View

ROWS, WIDTH, DIM = 12, 6, 5
# Rows per rank; none of them equal, and one rank with hardly any.
SPLITS = {1: [12], 2: [9, 3], 4: [5, 1, 4, 2]}


def batch_of(k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """k views of 12 samples: two share an id, and the last view is missing from some rows."""
    make = torch.Generator().manual_seed(k + 10 * seed)
    names = [f"v{i}" for i in range(k)]
    views = {v: View(torch.randn(ROWS, WIDTH, generator=make).to(dtype)) for v in names}
    ids = torch.arange(ROWS) + 2**60
    ids[7] = ids[2]
    present = {v: torch.ones(ROWS, dtype=torch.bool) for v in names}
    present[names[-1]][[0, 4, 5, 10]] = False
    return Batch(views, ids, present, torch.full((ROWS,), -1))


def rows_of(batch: Batch, rank: int, size: int) -> Batch:
    """This rank's share of the batch, by SPLITS."""
    ends = list(itertools.accumulate(SPLITS[size], initial=0))
    return batch.rows(slice(ends[rank], ends[rank + 1]))


def tower(**changes: Any) -> TowerConfig:
    encoder = {"kind": "mlp", "input": WIDTH, "width": 8, "depth": 1, **changes.pop("encoder", {})}
    return TowerConfig(encoder=encoder, **{"head": HeadConfig(layers=2), **changes})  # type: ignore[arg-type]


def task_of(
    k: int,
    dtype: torch.dtype,
    collectives: Collectives,
    objective: Any = None,
    teacher: TeacherConfig | None = None,
    **changes: Any,
) -> Task:
    """Two views share a tower; the others have their own, which are changed as asked.

    `objective`: settings, a class to call, or one that is there.
    """
    torch.manual_seed(0)
    views = {f"v{i}": "t0" if i < 2 else f"t{i}" for i in range(k)}
    if objective is None:
        objective = {"kind": "infonce", "temperature": {"init": 0.2, "per_pair": True}}
    if isinstance(objective, dict):
        names = [*views, *(teacher.names(views) if teacher else ())]
        objective = objectives.build(objective, names, collectives, DIM)
    elif isinstance(objective, type):
        objective = objective()
    towers = {t: tower(**changes) for t in sorted(set(views.values()))}
    return Task(views, towers, DIM, objective, collectives, teacher=teacher).to(dtype)


def engine_of(kind: str, task: Any = None, optimizer: Any = None, size: int = 1, **settings: Any) -> Any:
    """A task under an engine; `task` makes it from an collectives, `optimizer` from the task (default: SGD, rate 1)."""
    from mvpretrain.engine import start, wrap
    from mvpretrain.engine.settings import EngineConfig

    options = settings.pop("options", {})
    if kind == "zero3":  # else DeepSpeed keeps parameters as small as these whole
        options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} | options
    config = EngineConfig(**{"kind": kind, "options": options, "device": "cpu", "clip": None, "threads": 1} | settings)
    world = start(config)
    made = (task or (lambda collectives: task_of(3, torch.float32, collectives)))(world.collectives)
    trained = [p for p in made.parameters() if p.requires_grad]
    made.to(world.device)
    return wrap(world, made, optimizer(made) if optimizer else torch.optim.SGD(trained, lr=1.0), config, batch=ROWS)


def optimizer_of(task: Task, kind: str = "adamw", lr: float = 0.05) -> torch.optim.Optimizer:
    towers = {name: cast(Tower, module).config for name, module in task.towers.items()}
    return build_optimizer(task, towers, OptimizerConfig(kind=kind, lr=lr))


def digest(state: Any) -> str:
    """One line for nested state: equal if and only if every tensor in it is, bit for bit."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def held(engine: Any) -> str:
    """Digest of everything that a step may change on this rank; under ZeRO-3, of this rank's parts."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [v for group in inner.param_groups for p in group["params"] for v in (p, inner.state.get(p, {}))]
    return digest(
        [dict(engine.task.named_buffers()), [getattr(p, "ds_tensor", p) for p in engine.task.parameters()], moments]
    )

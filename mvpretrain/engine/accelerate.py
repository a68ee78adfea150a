"""One process, or DDP, by Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mvpretrain.engine import gradcache
from mvpretrain.engine.launch import World
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.engine.step import HasTeacher, Step, timer_of
from mvpretrain.types import Batch


class Accelerated:
    """A module in one process, or under DDP. ValueError: Accelerate sees another number of processes."""

    def __init__(self, world: World, task: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        # On CPUs, Accelerate takes one process for all there is unless it is given the backend.
        group = InitProcessGroupKwargs(backend="nccl" if world.device.type == "cuda" else "gloo")
        AcceleratorState._reset_state(reset_partial_state=True)  # it is a singleton: a second run must not inherit it
        self.world, self.task, self.config = world, task, config
        self.phase_timer = timer_of(task, world.device)
        self.accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision={"fp32": "no"}.get(world.precision, world.precision),
            kwargs_handlers=[group] if world.size > 1 else [],
        )
        if self.accelerator.num_processes != world.size:
            raise ValueError(
                f"{world.size} processes were started, Accelerate sees {self.accelerator.num_processes}; "
                "do not set ACCELERATE_USE_CPU or other ACCELERATE_* variables by hand"
            )
        # Accelerate's own Tensor moves would copy rows that are there already.
        self.model, prepared = self.accelerator.prepare(task, optimizer, device_placement=[True, False])
        if world.size > 1:
            # Ranks keep their own buffers; DDP would send rank 0's round before every step, per-rank state included.
            self.model.broadcast_buffers = False
        self.optimizer = cast(torch.optim.Optimizer, prepared)

    def step(self, batch: Batch, values: Sequence[float] = ()) -> Step:
        return gradcache.step(self, batch, values)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def reducing_once(self, count: int) -> Iterator[int]:
        for i in range(count):
            with self.accelerator.no_sync(self.model) if i + 1 < count else contextlib.nullcontext():
                yield i

    def optimizer_step(self) -> tuple[float | None, bool]:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip or float("inf"))
        assert norm is not None
        # The norm is of reduced gradients, so that every rank sees the same number. Under fp16 the scaler itself skips.
        stepped = self.world.precision == "fp16" or bool(torch.isfinite(norm))
        if stepped:
            self.optimizer.step()
            stepped = not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        return float(norm), stepped

    def update_ema(self) -> None:
        if isinstance(self.task, HasTeacher):
            self.task.update_ema()

    def save(self, folder: Path) -> None:
        if self.world.rank == 0:
            scaler = self.accelerator.scaler
            state = {
                "model": self.task.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            torch.save(state, folder / "engine.pt")

    def restore(self, folder: Path) -> None:
        if not (folder / "engine.pt").exists():
            raise ValueError(
                f"{folder} was not written by engine.kind={self.world.kind}; resume it with the kind it had"
            )
        state = torch.load(folder / "engine.pt", map_location=self.world.device, weights_only=True)
        try:
            self.task.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} is of another model: {reason}; resume with the recipe it had") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.task.state_dict().items()} if self.world.rank == 0 else {}

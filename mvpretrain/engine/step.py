"""What engines offer, what they ask of the module that they wrap, and what all ranks must agree on in a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mvpretrain.engine.launch import World
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.model.phase_timer import PhaseTimer
from mvpretrain.types import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step(NamedTuple):
    """What one step did. `loss` and `sums` are over all ranks, `parts` are this rank's."""

    loss: float
    parts: dict[str, Tensor]
    norm: float | None  # gradient norm before clipping; None where the engine has none
    stepped: bool  # False: the loss or the gradient was not finite, and nothing was changed
    sums: list[float]


@runtime_checkable
class Timed(Protocol):
    """Optional, of a module: it times its phases, and engines add theirs to the same timer."""

    phase_timer: PhaseTimer


@runtime_checkable
class HasTowers(Protocol):
    """Optional, of a module: only a part of it encodes; without this the whole module does."""

    def encoding_modules(self) -> list[nn.Module]:
        """The modules to compile, whose batch statistics are rank 0's in evaluation."""
        ...


@runtime_checkable
class HasTeacher(Protocol):
    """Optional, of a module: some parameters are moving averages of others."""

    def update_ema(self, part: Callable[[nn.Parameter], Tensor] = ...) -> list[nn.Parameter]:
        """Move them, and return them; `part` is what this rank holds of a parameter, the whole where not given."""
        ...


class Engine(Protocol):
    """A module and its optimiser under one way of running them."""

    world: World
    task: Any  # the module, `forward(batch) -> Losses`; with config.micro_batch a Task
    optimizer: torch.optim.Optimizer
    config: EngineConfig
    model: Any  # the module, wrapped: to be called where its gradient is wanted
    phase_timer: PhaseTimer

    def step(self, batch: Batch, values: Sequence[float] = ()) -> Step:
        """One optimiser step on this rank's rows, wherever they are.

        `values` are summed over ranks on the way, at no extra message. With `config.micro_batch`, rows go to the
        device and through the towers so many at a time.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar that `model` has returned to the parameters', scaled as the precision needs."""
        ...

    def reducing_once(self, count: int) -> Iterator[int]:
        """0 to count - 1, for as many calls of `model` and `backward` whose gradients are reduced over ranks once."""
        ...

    def optimizer_step(self) -> tuple[float | None, bool]:
        """(gradient norm, whether the optimiser has stepped): clip, step, forget the gradient."""
        ...

    def update_ema(self) -> None:
        """Let the teacher take its step towards the weights that `optimizer_step` has left."""
        ...

    def save(self, folder: Path) -> None:
        """Write model, optimiser and scaler state; every rank calls it."""
        ...

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote, bit for bit. ValueError: written by another kind of engine or world size."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The whole model's parameters and buffers on the CPU; every rank calls it, rank 0 gets them."""
        ...


def reduce_status(world: World, loss: Tensor, values: Sequence[float]) -> tuple[float, bool, list[float]]:
    """(mean loss, whether it is finite on every rank, sums of `values`), by one small message.

    All ranks must take the same branch: one that skips its backward alone leaves the others waiting for ever.
    """
    own = loss.detach().double()
    good = torch.isfinite(own)
    message = torch.stack([own, (~good).double(), *torch.tensor(values, dtype=torch.float64, device=own.device)])
    total = world.collectives.sum(message).tolist()
    return total[0] / world.size, total[1] == 0, total[2:]


def timer_of(module: nn.Module, device: torch.device) -> PhaseTimer:
    """The module's own timer, or a new one, reading this device's clock."""
    timer = module.phase_timer if isinstance(module, Timed) else PhaseTimer()
    timer.device = device
    return timer


def snapshot_buffers(module: nn.Module) -> list[Tensor]:
    """Copies of the buffers: a forward pass changes batch statistics before anyone knows whether it counts."""
    return [buffer.clone() for buffer in module.buffers()]


def restore_buffers(module: nn.Module, snapshot: Sequence[Tensor]) -> None:
    """Undo what a forward pass did to the buffers."""
    for buffer, value in zip(module.buffers(), snapshot, strict=True):
        buffer.copy_(value)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which modules compute in a precision, as engines have it around their forward passes."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def encoding_modules(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that encode: see `HasTowers`."""
    return module.encoding_modules() if isinstance(module, HasTowers) else [module]


@contextlib.contextmanager
def encoding(engine: Engine) -> Iterator[Any]:
    """The module for evaluation: no gradients, no dropout, the run's precision. Every rank must make the same calls.

    Ranks keep batch statistics of their own rows while they train; here all take rank 0's, which are those saved.
    """
    world, task = engine.world, engine.task
    task.eval()
    for buffer in (buffer for module in encoding_modules(task) for buffer in module.buffers()):
        if buffer.dtype != torch.bool:
            buffer.copy_(world.collectives.sum(buffer if world.rank == 0 else torch.zeros_like(buffer)))
    with torch.no_grad(), autocast(world.device, world.precision):
        yield task
    task.train()

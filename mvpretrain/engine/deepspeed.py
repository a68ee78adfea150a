"""DeepSpeed, ZeRO stages 0 to 3, with the recipe's own optimiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mvpretrain.engine import gradcache
from mvpretrain.engine.launch import World
from mvpretrain.engine.optimizer import same_kind
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.engine.step import HasTeacher, Step, timer_of
from mvpretrain.model.task import Task
from mvpretrain.types import Batch


class Zero:
    """A module under DeepSpeed, ZeRO stages 0 to 3, with an optimiser that is given.

    ValueError: a parameter without a dimension, an optimiser that ZeRO's flat pieces would change, a DeepSpeed that
    lacks what micro-batches need.
    """

    def __init__(
        self, world: World, task: nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, batch: int
    ):
        import deepspeed

        self.world, self.task, self.config, self.stage = world, task, config, int(world.kind[-1])
        self.phase_timer = timer_of(task, world.device)
        deepspeed.utils.logger.setLevel("WARNING")
        if world.device.type == "cpu":
            # The shared-memory collectives would be compiled at first use (40 s) and need a C++ compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _fit_for_zero(task)
        if self.stage and not _element_wise(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} scales by whole layers, and ZeRO-{self.stage} hands it flat pieces that "
                "depend on the number of ranks; set engine.kind=ddp or zero0, or optimizer.kind=adamw"
            )
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
        self.model, prepared, *_ = deepspeed.initialize(
            model=task, optimizer=optimizer, config=_zero_config(world, config, self.stage, batch)
        )
        if self.model.zero_optimization_stage() != self.stage or dist.get_world_size() != world.size:
            raise ValueError(
                f"asked DeepSpeed for ZeRO-{self.stage} on {world.size} ranks, got "
                f"ZeRO-{self.model.zero_optimization_stage()} on {dist.get_world_size()}"
            )
        self.optimizer = cast(torch.optim.Optimizer, prepared)
        if self.stage == 3:
            _register_projections(task)
        if config.micro_batch:
            self._prepare_for_passes()

    def step(self, batch: Batch, values: Sequence[float] = ()) -> Step:
        return gradcache.step(self, batch, values)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def reducing_once(self, count: int) -> Iterator[int]:
        with contextlib.ExitStack() as together:
            if self.stage:
                together.enter_context(self.model.coalesce_grad_reduction())
            for i in range(count):
                with contextlib.nullcontext() if self.stage or i + 1 == count else self.model.no_sync():
                    yield i
            with self.phase_timer("backward"):
                together.close()

    def optimizer_step(self) -> tuple[float | None, bool]:
        own = None
        if self.stage == 0 and self.world.precision != "fp16":
            # Without partitions, DeepSpeed neither checks the gradient nor computes its norm.
            own = float(get_total_norm([p.grad for p in self.task.parameters() if p.grad is not None]))
            if not math.isfinite(own):
                self.model.zero_grad()
                return own, False
        self.model.step()
        norm = own if own is not None else self.model.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        stepped = self.model.was_step_applied()
        if stepped and norm is not None and not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm} and ZeRO has stepped with it; resume from the last checkpoint with "
                "a lower optimizer.lr or engine.precision=fp32"
            )
        return norm, stepped

    def update_ema(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if not isinstance(self.task, HasTeacher):
            return
        if self.stage < 3:
            self.task.update_ema()
            return
        # Equal shapes are cut alike, so that each rank's pieces of the two belong together and nothing is sent.
        moved = self.task.update_ema(lambda p: cast(Any, p).ds_tensor)
        # Small weights are also held whole, and those copies are from before the step.
        whole: list[Any] = [p for p in moved if cast(Any, p).ds_status == ZeroParamStatus.AVAILABLE]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def _prepare_for_passes(self) -> None:
        import deepspeed

        if not hasattr(self.model, "coalesce_grad_reduction"):  # older versions lack it
            raise ValueError(
                f"engine.micro_batch={self.config.micro_batch} needs a DeepSpeed that can reduce once after several "
                f"backward passes, {deepspeed.__version__} cannot; install 0.19.8 or set engine.kind=ddp"
            )
        assert isinstance(self.task, Task)
        if self.stage == 3:
            # The second pass uses them in the task itself, where ZeRO-3 has not gathered them.
            for parameter in self.task.objective_parameters():
                deepspeed.zero.register_external_parameter(self.task, parameter)

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag="zero", client_state={"stage": self.stage, "size": self.world.size})

    def restore(self, folder: Path) -> None:
        if not (folder / "zero").is_dir():
            raise ValueError(
                f"{folder} was not written by engine.kind={self.world.kind}; resume it with the kind it had"
            )
        try:
            path, _ = self.model.load_checkpoint(str(folder), tag="zero")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} is of another model: {reason}; resume with the recipe it had") from error
        if path is None:
            raise ValueError(f"{folder}/zero does not load on {self.world.size} ranks under ZeRO-{self.stage}")

    def weights(self) -> dict[str, Tensor]:
        import deepspeed

        keep, found = self.world.rank == 0, {}
        for name, parameter in self.task.named_parameters():
            # One at a time: the whole model must fit the CPU memory of one rank, not the GPU's.
            whole = deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext()
            with whole:
                if keep:
                    found[name] = parameter.detach().cpu().clone()
        if keep:
            state = self.task.state_dict(keep_vars=True).keys()  # some buffers are no part of it
            found.update((k, v.detach().cpu().clone()) for k, v in self.task.named_buffers() if k in state)
        return found


def _register_projections(task: nn.Module) -> None:
    """torch's attention reads the weights of its last projection without calling it, so that ZeRO-3 gathers them too.

    Within the engine's own forward DeepSpeed finds that out; evaluation and the first of two passes are without it.
    """
    import deepspeed

    for module in task.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            for parameter in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def _fit_for_zero(task: nn.Module) -> None:
    """DeepSpeed 0.19.8 reinterprets parameters as bytes, which scalars and channels-last weights do not allow."""
    for name, parameter in task.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"parameter {name!r} has no dimension, DeepSpeed cannot hold it; give it shape [1]")
        parameter.data = parameter.data.contiguous()


def _element_wise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser moves a flat piece of a weight as it moves it in the whole: LAMB, LARS and Muon do not."""
    start, gradient = torch.linspace(1, 3, 24), torch.linspace(-1, 2, 24).exp()

    def moved(*shape: int, part: slice = slice(None)) -> Tensor:
        weight = torch.nn.Parameter(start[part].reshape(shape).clone())
        trial = same_kind(optimizer, [{**optimizer.param_groups[0], "params": [weight]}])
        for _ in range(2):
            weight.grad = gradient[part].reshape(shape).clone()
            trial.step()
        return weight.detach().flatten() - start[part]

    pieces = torch.cat([moved(9, part=slice(9)), moved(15, part=slice(9, 24))])
    return torch.allclose(moved(4, 6), pieces, rtol=1e-3)


def _zero_config(world: World, config: EngineConfig, stage: int, batch: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch // world.size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.clip or 0.0,  # left out, DeepSpeed clips at 1
    }
    if world.precision != "fp32":
        # Parameters stay float32 and modules run under autocast: buffers and norms are then of one type on any device.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[world.precision],
        }
    return _merged(settings, config.options)


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(ours)
    for key, value in theirs.items():
        both[key] = _merged(both.get(key, {}), value) if isinstance(value, Mapping) else value
    return both

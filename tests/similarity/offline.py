"""Triton without a GPU: kernels interpreted on the CPU, or compiled and not run. Each takes a process of its own."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import torch


def interpret(rank: int) -> None:
    """From now on, kernels of this process are interpreted."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # Triton 3.9 keeps bfloat16 as the bits of an integer: its product multiplies these, and its rounding cuts them off.
    builder: Any = interpreter.InterpreterBuilder
    exact_dot, exact_cast = builder.create_dot, builder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return exact_dot(self, widened(a), widened(b), *rest)

    def create_fp_trunc(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return exact_cast(self, x, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc = create_dot, create_fp_trunc


class Compiled(NamedTuple):
    shared: int  # bytes of shared memory
    assembly: str


def compile_only(capability: int, cache: str) -> dict[str, Compiled]:
    """From now on, kernels are compiled for a GPU that need not be there instead of run; what they become, by name."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    found: dict[str, Compiled] = {}
    absent: Any = Absent()
    whole_run: Any = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = whole_run(self, *args, grid=grid, warmup=True, **settings)
        found[self.__name__] = Compiled(kernel.metadata.shared, kernel.asm["ptx"])
        return kernel

    driver.set_active(absent)
    JITFunction.run = compile_instead  # type: ignore[method-assign]
    return found

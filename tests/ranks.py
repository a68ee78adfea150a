"""How the tests set up every process, their own and those of their pools: checked shapes, warnings as errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial

from mvpretrain.distributed.pool import Pool

CHECKED = (
    "mvpretrain.similarity",
    "mvpretrain.transport",
    "mvpretrain.model",
    "mvpretrain.objectives",
    "mvpretrain.distributed.collectives",
    "mvpretrain.distributed.gather",
    "mvpretrain.distributed.sample_state",
    "mvpretrain.distributed.id_table",
)


def check_shapes() -> None:
    """From now on, modules named in CHECKED are imported with their shape annotations checked at every call."""
    from jaxtyping import install_import_hook

    early = [m for m in sys.modules if m.startswith(CHECKED)]
    assert not early, f"imported before the shape checks were installed: {early}"
    install_import_hook(list(CHECKED), "beartype.beartype")


def pool_of(size: int, warning_filters: Sequence[str]) -> Pool:
    """Ranks that check shapes and take warnings as pytest does; `warning_filters` are lines of its configuration."""
    return Pool(size, partial(set_up, tuple(warning_filters)), preload=("torch", "jaxtyping", "beartype"))


def set_up(warning_filters: Sequence[str]) -> None:
    from _pytest.config import parse_warning_filter

    check_shapes()
    import torch  # noqa: F401  (what it warns of while it is imported is not ours)

    for text in warning_filters:
        warnings.filterwarnings(*parse_warning_filter(text, escape=False))


def without_jit() -> None:
    """Call in a rank before DeepSpeed starts: on a CPU it would compile its shared-memory collectives for 40 s."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

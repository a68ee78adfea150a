"""One rank of one side of `unchanged`: what the package that is found first computes for every case.

    PYTHONPATH=TREE RANK=0 WORLD_SIZE=1 python -P tools/compare/unchanged_probe.py CASES.json OUT STORE

Writes OUT/rank-RANK.safetensors with value, parts, gradients, parameters, buffers and numbers by sample id of every
case, and OUT/rank-RANK.json with the kinds of objective and the files of the package that was found. It imports nothing
beside itself, so that the same file serves any state of the package; where a name has moved, WHERE lists its paths.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

# What the probe calls -> where it is or was, `module:name`, the newest first.
WHERE: dict[str, tuple[str, ...]] = {
    "build": ("mvpretrain.objectives:build",),
    "registry": ("mvpretrain.objectives:registry", "mvpretrain.objectives:door"),
    "Embeddings": ("mvpretrain.types:Embeddings",),
    "SingleProcess": (
        "mvpretrain.distributed.collectives:SingleProcess",
        "mvpretrain.distributed.collectives:Alone",
        "mvpretrain.exchange:Alone",
    ),
    "ProcessGroup": (
        "mvpretrain.distributed.collectives:ProcessGroup",
        "mvpretrain.distributed.collectives:Ranks",
        "mvpretrain.exchange:Ranks",
    ),
    "gather": (
        "mvpretrain.distributed.gather:gather_embeddings",
        "mvpretrain.distributed.gather:gather_table",
        "mvpretrain.distributed.gather:gather",
        "mvpretrain.distributed.gather:share",
        "mvpretrain.distributed.collectives:share",
        "mvpretrain.exchange:share",
    ),
    "save_sample_state": ("mvpretrain.distributed.sample_state:save", "mvpretrain.sharded:save"),
    "forget": (
        "mvpretrain.distributed.sample_state:forget",
        "mvpretrain.distributed.sample_state:discard",
        "mvpretrain.sharded:forget",
    ),
}
DIM, STEPS = 8, 3
ROWS = {"small": 12, "tiled": 1100}
# Rows of each rank by step, in twelfths of the table: unequal, one rank with nothing, equal.
SPLITS = {
    1: [[12], [12], [12]],
    2: [[9, 3], [12, 0], [6, 6]],
    3: [[5, 1, 6], [7, 0, 5], [4, 4, 4]],
}


def find(thing: str) -> Any:
    """The class or function under the first of its names that there is. LookupError: none of them."""
    for path in WHERE[thing]:
        module, _, name = path.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise LookupError(f"{thing} is at none of {', '.join(WHERE[thing])}; add where it is to WHERE of {__file__}")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(case: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    """(z, ids, present, labels) of the whole batch: ids that come back from step to step, three of them equal, labels
    for some, and rows that lack the first or the last view, or both.
    """
    rows, views = ROWS[case["table"]], [f"view{v}" for v in range(case["k"])]
    ids = torch.randperm(rows + 4, generator=torch.Generator().manual_seed(step))[:rows] + 2**60
    ids[7] = ids[2] = ids[11]
    present = {v: torch.ones(rows, dtype=torch.bool) for v in views}
    present[views[-1]][[0, 4, 7, 10]] = False
    present[views[0]][[4, 6]] = False
    labels = torch.arange(rows) * 7 % 5 - 1
    dtype = getattr(torch, case["dtype"])
    z = {v: normalize(draw(100 * step + i, rows, DIM), dim=1).to(dtype) for i, v in enumerate(views)}
    return z, ids, present, labels


def built(case: dict[str, Any], collectives: Any) -> nn.Module:
    """The objective, its parameters moved off their first values by different amounts."""
    torch.manual_seed(0)
    objective = find("build")(case["config"], [f"view{v}" for v in range(case["k"])], collectives, DIM)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_((torch.arange(p.numel()) % 5).view_as(p) / 50)
    return objective.to(getattr(torch, case["dtype"]))


def observed(case: dict[str, Any], collectives: Any) -> Iterator[tuple[str, Tensor]]:
    """Everything that a few steps give on this rank, by name; the second is one that is not taken."""
    objective = built(case, collectives)
    yield from ((f"start/{name}", x) for name, x in state_of(objective, collectives.rank))
    for step in range(STEPS if case["table"] == "small" else 1):
        yield from ((f"step {step}/{name}", x) for name, x in one_step(objective, case, step, collectives))
        if step == 1:
            find("forget")(objective)
        else:
            optimizer_step(objective, collectives)
    yield from ((f"end/{name}", x) for name, x in state_of(objective, collectives.rank))
    yield "end/next random number", torch.rand(1)
    objective.eval()
    with torch.no_grad():
        yield from ((f"evaluated/{name}", x) for name, x in one_step(objective, case, STEPS, collectives))


def one_step(objective: nn.Module, case: dict[str, Any], step: int, collectives: Any) -> Iterator[tuple[str, Tensor]]:
    """Value and parts and, where gradients are on, those of this rank's rows and of the parameters."""
    z, ids, present, labels = table(case, step)
    split = SPLITS[collectives.size][step % STEPS]
    ends = [sum(split[:r]) * len(ids) // 12 for r in (collectives.rank, collectives.rank + 1)]
    mine = slice(*ends)
    leaves = {v: x[mine].clone().requires_grad_(torch.is_grad_enabled()) for v, x in z.items()}
    local = find("Embeddings")(
        z=leaves, ids=ids[mine], present={v: p[mine] for v, p in present.items()}, labels=labels[mine]
    )
    tables = find("gather")(local, collectives, getattr(objective, "gathers", None))
    losses = objective(*tables)
    yield "total", losses.total.detach()
    yield from ((f"parts/{name}", x.detach()) for name, x in losses.parts.items())
    if not torch.is_grad_enabled():
        return
    objective.zero_grad()
    losses.total.backward()
    yield from ((f"gradient/z/{v}", x.grad) for v, x in leaves.items() if x.grad is not None)
    yield from ((f"gradient/{name}", p.grad) for name, p in objective.named_parameters() if p.grad is not None)


@torch.no_grad()
def optimizer_step(objective: nn.Module, collectives: Any) -> None:
    """A step of plain gradient descent by the mean over ranks."""
    for p in objective.parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.sub_(collectives.sum(gradient.clone()) / collectives.size, alpha=0.01)


def state_of(objective: nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """The state dict, and this rank's numbers by sample id under their names in a checkpoint."""
    yield from ((f"state/{name}", x) for name, x in objective.state_dict().items())
    with tempfile.TemporaryDirectory() as folder:
        find("save_sample_state")(objective, Path(folder), rank)
        for path in Path(folder).iterdir():
            yield from ((f"by id/{name}", x) for name, x in load_file(path).items())


def files() -> list[str]:
    """Where the modules of the package that were imported are."""
    modules = (m for name, m in sys.modules.items() if name.partition(".")[0] == "mvpretrain")
    return sorted({str(Path(m.__file__).resolve()) for m in modules if m.__file__})


def main(cases: str, out: str, store: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if size > 1:
        limit = timedelta(minutes=10)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    collectives = find("ProcessGroup" if size > 1 else "SingleProcess")()
    kinds, found = sorted(find("registry").kinds()), {}
    for case in json.loads(Path(cases).read_text()):
        if case["config"]["kind"] not in kinds:
            continue
        try:
            # clone: safetensors refuses tensors that share memory.
            values = {name: x.detach().clone().contiguous() for name, x in observed(case, collectives)}
        except Exception as error:
            error.add_note(f"the case: {case}")
            raise
        found.update((f"{case['name']}/{name}", x) for name, x in values.items())
    save_file(found, Path(out) / f"rank-{rank}.safetensors")
    (Path(out) / f"rank-{rank}.json").write_text(json.dumps({"kinds": kinds, "files": files()}))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends the ordinary way, after all its work is done


if __name__ == "__main__":
    main(*sys.argv[1:])

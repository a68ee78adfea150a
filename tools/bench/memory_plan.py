"""Predicted against measured peak memory: `mvpretrain train --dry-run` beside `mvpretrain bench`, on many kinds of run.

    python -m tools.bench.memory_plan [--only NAME ...] [--device cpu] [--json FILE]

Every cell is two fresh processes (or as many as it has ranks): one predicts, the other runs real steps and says the
most memory that a rank had, the process's on CPUs (VmHWM), that of tensors on GPUs (torch's max_memory_allocated). The
last column leaves out what the process had before there was a model, which flatters small models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mvpretrain.profiling.bench import in_processes

BASE: dict[str, Any] = {
    "run": "run",
    "data": {"kind": "synthetic", "samples": 512, "eval_samples": 0},
    "views": {
        "image": {"kind": "image", "field": "a", "size": 64},
        "text": {"kind": "text", "field": "b", "length": 64},
    },
    "towers": {
        "image": {"encoder": {"kind": "vit", "image_size": 64, "patch": 8, "width": 384, "depth": 6, "heads": 6}},
        "text": {"encoder": {"kind": "transformer", "length": 64, "width": 384, "depth": 4, "heads": 6}},
    },
    "objective": {"kind": "infonce"},
    "dim": 128,
    "batch": 16,
    "steps": 9,
    "loader": {"workers": 0},
}
WIDE = [f"towers.{name}.encoder.{key}" for name in ("image", "text") for key in ("width=768", "heads=12")]
CONV = "towers.image.encoder={kind: conv, channels: 3, width: 64, stages: 3, depth: 2}"
CHECKPOINTED = [f"towers.{name}.checkpoint_activations=true" for name in ("image", "text")]
CELLS: dict[str, tuple[int, list[str]]] = {  # name -> ranks, overrides
    "none": (1, []),
    "none, 48 rows": (1, ["batch=48"]),
    "none, bf16": (1, ["engine.precision=bf16"]),
    "none, checkpointed": (1, CHECKPOINTED),
    "none, micro_batch 4": (1, ["engine.micro_batch=4"]),
    "none, sgd": (1, ["optimizer={kind: sgd, options: {momentum: 0.9}}"]),
    "none, wide, 4 rows": (1, [*WIDE, "batch=4"]),
    "none, wide, micro_batch 4": (1, [*WIDE, "engine.micro_batch=4"]),
    "none, convolutions": (1, [CONV]),
    "ddp": (2, ["engine.kind=ddp"]),
    "ddp, micro_batch 2": (2, ["engine.kind=ddp", "engine.micro_batch=2"]),
    "ddp, wide, 8 rows": (2, [*WIDE, "engine.kind=ddp", "batch=8"]),
    "zero0": (2, ["engine.kind=zero0"]),
    "zero1": (2, ["engine.kind=zero1"]),
    "zero2": (2, ["engine.kind=zero2"]),
    "zero2, micro_batch 2": (2, ["engine.kind=zero2", "engine.micro_batch=2"]),
    "zero2, wide, 8 rows": (2, [*WIDE, "engine.kind=zero2", "batch=8"]),
    "zero3": (2, ["engine.kind=zero3"]),
    "zero3, wide, 8 rows": (2, [*WIDE, "engine.kind=zero3", "batch=8"]),
    "zero2, bf16, checkpointed": (2, ["engine.kind=zero2", "engine.precision=bf16", *CHECKPOINTED]),
}


class Cell(NamedTuple):
    """Bytes of the rank that had most."""

    name: str
    predicted: int
    measured: int
    baseline: int  # of the process without a model, 0 on GPUs

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_above(self) -> float:
        """The error in what is above the baseline."""
        return (self.predicted - self.baseline) / (self.measured - self.baseline) - 1


def measured(name: str, device: str, folder: Path) -> Cell:
    """One cell: predict in one process, run in others."""
    ranks, overrides = CELLS[name]
    recipe, plan = folder / "recipe.yaml", folder / "plan.json"
    recipe.write_text(yaml.safe_dump(BASE))
    overrides = [*overrides, f"engine.device={device}", "engine.threads=1"]
    predict(recipe, [*overrides, f"engine.ranks={ranks}"], plan)
    found = in_processes(recipe, overrides, ranks, steps=2, warmup=1)
    baseline = found["baseline"] if found["device"] == "cpu" else 0
    return Cell(name, json.loads(plan.read_text())["peak"], max(found["peaks"]), baseline)


def predict(recipe: Path, overrides: list[str], out: Path) -> None:
    """The plan of `mvpretrain train --dry-run`, by a process that nothing was measured in."""
    command = ["mvpretrain", "train", str(recipe), *overrides, "--dry-run", "--json", str(out)]
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="NAME")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    cells: list[Cell] = []
    print(f"{'':30}{'predicted':>12}{'measured':>12}{'error':>9}{'above the baseline':>20}")
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            cells.append(measured(name, args.device, Path(folder)))
        c = cells[-1]
        sizes = "".join(f"{x / 2**20:8,.0f} MiB" for x in (c.predicted, c.measured))
        print(f"{name:30}{sizes}{c.error:+9.1%}{c.error_above:+20.1%}", flush=True)
    within = sum(abs(c.error) <= 0.15 for c in cells)
    print(f"{within} of {len(cells)} within 15 %; the largest error is {max(abs(c.error) for c in cells):.1%}")
    if args.json:
        args.json.write_text(json.dumps([c._asdict() for c in cells], indent=1) + "\n")
    return 0 if within == len(cells) else 1


if __name__ == "__main__":
    raise SystemExit(main())

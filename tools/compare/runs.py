"""Whether two runs are the same: their losses step by step, and their final weights.

    python -m tools.compare.runs RUN_A RUN_B [--tolerance 1e-6] [--top 5]

A refactor is shown with it: train the same recipe before and after. Exit code 0 where every loss and every weight is
bit-identical (or differs by at most the tolerance), 1 where one is not, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, of the logged steps."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {r["step"]: float(r["loss"]) for r in records if "loss" in r}


def weights(run: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Name and weights of the last whole checkpoint."""
    found = sorted(p.parent for p in (run / "checkpoints").glob("step-*/weights.safetensors"))
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint with weights.safetensors; train it first")
    return found[-1].name, load_file(found[-1] / "weights.safetensors")


def apart(a: float, b: float) -> float:
    """The difference of two losses; none between two that are not finite in the same way."""
    return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) if math.isfinite(a - b) else math.inf


def between(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two tensors; infinite where their shapes or types differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    difference = 0.0 if torch.equal(a, b) else (a.double() - b.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def report(noun: str, differences: dict[str, float], lonely: set[str], tolerance: float, top: int) -> bool:
    """Print the largest differences and what only one run has; whether all are within the tolerance."""
    far = {name: d for name, d in differences.items() if d > tolerance}
    equal = sum(d == 0 for d in differences.values())
    print(f"{noun}: {equal} of {len(differences)} bit-identical, {len(far)} differ by more than {tolerance:g}")
    for name in sorted(far, key=lambda name: -far[name])[:top]:
        print(f"  {name}: {far[name]:.3g}")
    if far:
        print(f"  first that differs: {next(name for name in differences if name in far)}")
    if lonely:
        print(f"  in one run only: {', '.join(sorted(lonely)[:top])}{' ...' * (len(lonely) > top)}")
    return bool(differences) and not far and not lonely


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="the folder of a run")
    parser.add_argument("--tolerance", type=float, default=0.0, help="the largest difference that counts as none (0)")
    parser.add_argument("--top", type=int, default=5, help="how many differences to print (5)")
    args = parser.parse_args(argv)
    try:
        a, b = (losses(run) for run in args.runs)
        (name_a, u), (name_b, v) = (weights(run) for run in args.runs)
    except FileNotFoundError as error:
        parser.error(str(error))
    steps = {f"step {step}": apart(a[step], b[step]) for step in sorted(a.keys() & b.keys())}
    same = report("losses", steps, {f"step {step}" for step in a.keys() ^ b.keys()}, args.tolerance, args.top)
    tensors = {name: between(u[name], v[name]) for name in u if name in v}
    noun = f"weights of {' and '.join(dict.fromkeys((name_a, name_b)))}"
    return 0 if report(noun, tensors, u.keys() ^ v.keys(), args.tolerance, args.top) and same else 1


if __name__ == "__main__":
    raise SystemExit(main())

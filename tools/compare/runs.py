"""Whether two runs are the same: what they logged, step by step, and everything in their checkpoints.

    python -m tools.compare.runs RUN_A RUN_B [--tolerance 1e-6] [--top 5]

A refactor is shown with it: train the same recipe before and after. Compared are losses and all other logged values but
times, and of every checkpoint weights, the engine's state (model, optimiser, scaler; ZeRO's parts), numbers by sample
id, random generators, step, cursor, metrics, and the recipe. Exit code 0 where all of it is bit-identical (or numbers
differ by at most the tolerance), 1 where something is not, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

TIMES = ("samples/s", "data_wait", "time/")  # what log.jsonl says of the machine: names, and beginnings of names
# What the files of a checkpoint hold, by the beginning of their names.
NOUNS = {
    "weights": "weights",
    "engine": "engine state",
    "zero": "engine state",
    "keyed": "numbers by sample id",
    "rank": "random generators",
    "meta": "step, cursor and metrics",
    "recipe": "recipe",
}
# What a state file may build while it is read, none of which runs anything: tensors, arrays, plain collections.
KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
SAFE = {
    "torch": ("Size", "device", *(f"{kind}Storage" for kind in KINDS)),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch.serialization": ("_get_layout",),
    "numpy": ("ndarray", "dtype"),
    "collections": ("OrderedDict", "defaultdict", "Counter"),
    "_codecs": ("encode",),
    "builtins": ("set", "frozenset", "dict", "list", "tuple", "int", "float", "bytearray"),
}
SAFE |= {f"numpy.{core}.multiarray": ("_reconstruct", "scalar") for core in ("core", "_core")}
SAFE |= {f"numpy.{core}.numeric": ("_frombuffer",) for core in ("core", "_core")}


class Group(NamedTuple):
    """One kind of thing that was compared."""

    noun: str
    differences: dict[str, float]  # by name, of what both runs have; 0 is bit-identical
    lonely: set[str]  # what one run has and the other has not

    @property
    def equal(self) -> bool:
        return self.same(0.0)

    def same(self, tolerance: float) -> bool:
        return bool(self.differences) and not self.lonely and not self.far(tolerance)

    def far(self, tolerance: float) -> dict[str, float]:
        return {name: d for name, d in self.differences.items() if d > tolerance}


class Unknown:
    """Stands for an object of any other class in a state file: its name without the module, which may have moved."""

    state: Any = ()  # what its constructor was given, then what it was given back

    def __init__(self, *arguments: Any):
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = (self.state, state)


class Unpickler(pickle.Unpickler):
    """Reads state files of any version without importing, or running, what they name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in SAFE.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return type(name.rpartition(".")[2], (Unknown,), {})


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested state; leaves are tensors, arrays and plain values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}/{i}" if name else str(i))
    elif isinstance(value, Unknown):
        yield from flat(value.state, f"{name}/{type(value).__name__}")
    else:
        yield name or "value", value


def read(path: Path) -> dict[str, Any]:
    """What a file of a checkpoint holds, by name."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.suffix == ".json":
        return dict(flat(json.loads(path.read_text())))
    if path.suffix == ".npy":
        return {"array": np.load(path)}
    if path.suffix == ".pt":
        module: Any = SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="pickle")
        return dict(flat(torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)))
    if path.suffix == ".yaml":
        return dict(flat(yaml.safe_load(path.read_text())))
    return {"text": path.read_text()}


def state(folder: Path) -> dict[str, dict[str, Any]]:
    """Noun -> everything of that kind in a folder of files, by file and name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        noun = next((n for start, n in NOUNS.items() if name.startswith(start)), "other files")
        prefix = "" if noun == "weights" else f"{name}: "
        found.setdefault(noun, {}).update((prefix + key, x) for key, x in read(path).items())
    return found


def logged(run: Path) -> dict[str, dict[str, float]]:
    """`losses`, and `log values`: all others but times; by step and name."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    values: dict[str, dict[str, float]] = {"losses": {}, "log values": {}}
    for record in records:
        for name, value in record.items():
            if name == "loss":
                values["losses"][f"step {record['step']}"] = value
            elif name != "step" and not name.startswith(TIMES):
                values["log values"][f"step {record['step']}: {name}"] = value
    return values


def between(a: Any, b: Any) -> float:
    """0 where two values are the same to the last bit, else their largest difference; infinite where none can be said.

    A difference that rounds to nothing (-0.0 and 0.0) is the smallest number.
    """
    if isinstance(a, int | float) and isinstance(b, int | float) and type(a) is type(b):
        a, b = (torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.tensor(x) for x in (a, b))
    a, b = (torch.from_numpy(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x for x in (a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a).__name__ == type(b).__name__ and (a == b or str(a) == str(b)) else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(*(x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))):
        return 0.0
    difference = (a.double() - b.double()).abs()
    both = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    largest = difference.masked_fill(both, 0).max().item()
    return max(largest, 5e-324) if math.isfinite(largest) else math.inf


def grouped(noun: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Group:
    return Group(noun, {name: between(a[name], b[name]) for name in a if name in b}, set(a.keys() ^ b.keys()))


def folders(noun: str, a: Path, b: Path) -> list[Group]:
    """Two folders of files, one group for each kind of thing in them; `noun` says what the folders are."""
    u, v = state(a), state(b)
    return [grouped(f"{kind} of {noun}", u.get(kind, {}), v.get(kind, {})) for kind in dict.fromkeys([*u, *v])]


def checkpoints(run: Path) -> dict[str, Path]:
    """The whole checkpoints of a run by name, oldest first."""
    found = sorted(p.parent for p in (run / "checkpoints").glob("step-*/weights.safetensors"))
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint with weights.safetensors; train it first")
    return {path.name: path for path in found}


def compare(a: Path, b: Path) -> list[Group]:
    """Everything that two runs left, the log first. FileNotFoundError: no log, or no checkpoint."""
    one, other = logged(a), logged(b)
    groups = [grouped(noun, one[noun], other[noun]) for noun in one]
    known, theirs = checkpoints(a), checkpoints(b)
    last = tuple(list(found)[-1] for found in (known, theirs))
    pairs = [(name, name) for name in known if name in theirs and name not in last] + [last]
    for u, v in pairs:
        groups += folders(" and ".join(dict.fromkeys((u, v))), known[u], theirs[v])
    return [group for group in groups if group.differences or group.lonely]


def report(group: Group, tolerance: float, top: int) -> bool:
    """Print the largest differences and what only one run has; whether all are within the tolerance."""
    far, lonely = group.far(tolerance), group.lonely
    equal = sum(d == 0 for d in group.differences.values())
    print(
        f"{group.noun}: {equal} of {len(group.differences)} bit-identical, {len(far)} differ by more than {tolerance:g}"
    )
    for name in sorted(far, key=lambda name: -far[name])[:top]:
        print(f"  {name}: {far[name]:.3g}")
    if far:
        print(f"  first that differs: {next(iter(far))}")
    if lonely:
        print(f"  in one run only: {', '.join(sorted(lonely)[:top])}{' ...' * (len(lonely) > top)}")
    return group.same(tolerance)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="the folder of a run")
    parser.add_argument("--tolerance", type=float, default=0.0, help="the largest difference that counts as none (0)")
    parser.add_argument("--top", type=int, default=5, help="how many differences to print (5)")
    args = parser.parse_args(argv)
    try:
        groups = compare(*args.runs)
    except FileNotFoundError as error:
        parser.error(str(error))
    same = [report(group, args.tolerance, args.top) for group in groups]  # a list: all of them are printed
    return 0 if all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())

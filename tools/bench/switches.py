"""What each switch for speed or memory does: steps of one recipe with it and without it, in turn.

    python -m tools.bench.switches [RECIPE] [key.sub=value ...] [--only NAME ...] [--steps 6] [--repeats 2]

Every side is `mvpretrain bench` in a process of its own, off and on by turns. Without a recipe: small images through
convolutions, the same kind through a ViT, and captions of 10 to 126 bytes through a transformer, on one rank.

Ratios are on over off, medians over the repeats. Memory is the peak above what the process held before it had a model
(of tensors, on GPUs); for `compile` the compiler's own is in it. Phases are milliseconds a step, off and on, for those
that the switch is about. A switch that cannot run here has its reason instead of figures.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from mvpretrain.profiling.bench import in_processes
from mvpretrain.recipe import Recipe, load
from mvpretrain.shards.pack import write_splits

BASE: dict[str, Any] = {
    "run": "run",
    "views": {
        "photo": {"kind": "image", "field": "png", "size": 32},
        "scan": {"kind": "image", "field": "png", "size": 32},
        "text": {"kind": "text", "field": "txt", "length": 128},
    },
    "towers": {
        "photo": {"encoder": {"kind": "conv", "width": 32, "stages": 3, "depth": 1}},
        "scan": {"encoder": {"kind": "vit", "image_size": 32, "patch": 4, "width": 192, "depth": 4, "heads": 3}},
        "text": {"encoder": {"kind": "transformer", "length": 128, "width": 192, "depth": 4, "heads": 3}},
    },
    "objective": {"kind": "infonce"},
    "dim": 128,
    "batch": 32,
    "steps": 1000,
    "loader": {"workers": 1},
    "engine": {"precision": "fp32"},
}
PARTS = 8  # micro-batches of a rank's rows


class Switch(NamedTuple):
    """The settings of both sides, and the phases of a step that it changes."""

    off: list[str]
    on: list[str]
    phases: tuple[str, ...]


class Row(NamedTuple):
    """What a switch does, on over off, or why it could not be tried."""

    name: str
    speed: float = 0.0  # samples/s
    lowest: float = 0.0  # of the repeats' own ratios
    highest: float = 0.0
    memory: float = 0.0
    milliseconds: dict[str, tuple[float, float]] = {}  # phase -> off, on
    reason: str = ""


def samples(count: int) -> Iterator[dict[str, Any]]:
    """Noise as PNG, and lines of letters whose lengths vary as those of captions do."""
    make = np.random.default_rng(0)
    for i in range(count):
        stream = io.BytesIO()
        Image.fromarray(make.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
        length = int(np.clip(make.lognormal(3.9, 0.5), 10, 126))
        text = bytes(make.integers(97, 123, length, dtype=np.uint8))
        yield {"__key__": f"{i:06d}", "png": stream.getvalue(), "txt": text}


def own_recipe(folder: Path, count: int = 256) -> Path:
    """The recipe that is measured where none is given, with its shards."""
    shards = write_splits(folder / "shards", {"train": samples(count)}, count)["train"].shards
    recipe = folder / "base.yaml"
    recipe.write_text(yaml.safe_dump(BASE | {"data": {"kind": "shards", "train": [str(p) for p in shards]}}))
    return recipe


def switches(recipe: Recipe, ranks: int) -> dict[str, Switch]:
    """Every switch, for the towers and rows of this recipe."""
    towers, phases = recipe.towers_of_views(), ("encode", "backward")
    texts = sorted({towers[v] for v, view in recipe.views.items() if view.kind == "text"})
    cut = f"engine.micro_batch={max(1, recipe.batch // ranks // PARTS)}"
    whole = ["engine.micro_batch=null", "engine.first_pass=same"]

    def of_towers(names: Any, setting: str) -> list[str]:
        return [f"towers.{name}.{setting}" for name in names]

    return {
        "compile": Switch(["engine.compile=false"], ["engine.compile=true"], phases),
        "bf16": Switch(["engine.precision=fp32"], ["engine.precision=bf16"], phases),
        "channels_last": Switch(["engine.channels_last=false"], ["engine.channels_last=true"], phases),
        "fused": Switch(["optimizer.options.fused=null"], ["optimizer.options.fused=true"], ("optimizer",)),
        "checkpoint_activations": Switch(
            of_towers(recipe.towers, "checkpoint_activations=false"),
            of_towers(recipe.towers, "checkpoint_activations=true"),
            phases,
        ),
        "length_groups": Switch(of_towers(texts, "length_groups=1"), of_towers(texts, "length_groups=4"), phases),
        "micro_batch": Switch(whole, [cut, "engine.first_pass=same"], phases),
        "micro_batch, first_pass bf16": Switch(whole, [cut, "engine.first_pass=bf16"], phases),
    }


def tried(name: str, switch: Switch, recipe: Path, options: argparse.Namespace) -> Row:
    """One switch: off and on by turns."""
    if not switch.on:
        return Row(name, reason="no tower of this recipe reads text")
    off, on = [], []
    for _ in range(options.repeats):
        for settings, found in ((switch.off, off), (switch.on, on)):
            try:
                overrides = [*options.overrides, *settings]
                found.append(in_processes(recipe, overrides, options.ranks, options.steps, options.warmup))
            except (ValueError, MemoryError) as error:
                return Row(name, reason=" ".join(str(error).split())[:200])
    return compared(name, switch.phases, off, on)


def compared(name: str, phases: tuple[str, ...], off: list[dict[str, Any]], on: list[dict[str, Any]]) -> Row:
    """Both sides' figures as `mvpretrain bench` writes them, repeat by repeat."""
    ratios = [b["samples"] / a["samples"] for a, b in zip(off, on, strict=True)]
    a, b = (median(held(figures) for figures in side) for side in (off, on))
    means = {p: tuple(median(f["milliseconds"][p] for f in side) for side in (off, on)) for p in phases}
    return Row(name, median(ratios), min(ratios), max(ratios), b / a, means)  # type: ignore[arg-type]


def held(figures: dict[str, Any]) -> int:
    """Bytes of the rank that held most; on CPUs above what its process had without a model."""
    return max(figures["peaks"]) - (figures["baseline"] if figures["device"] == "cpu" else 0)


def line(row: Row) -> str:
    if row.reason:
        return f"{row.name:30}{'-':>10}{'':18}{'-':>9}   {row.reason}"
    spread = f"{row.lowest:.2f} to {row.highest:.2f}"
    phases = ", ".join(f"{phase} {off:.1f} -> {on:.1f} ms" for phase, (off, on) in row.milliseconds.items())
    return f"{row.name:30}{row.speed:8.2f} x{spread:>18}{row.memory:7.2f} x   {phases}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="a YAML file, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of both sides")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the switches in the table")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="that are timed, in each process")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args(argv)
    if options.recipe and "=" in str(options.recipe):  # overrides alone: of the recipe that is made here
        options.overrides, options.recipe = [str(options.recipe), *options.overrides], None
    with tempfile.TemporaryDirectory() as folder:
        recipe = options.recipe or own_recipe(Path(folder))
        known = switches(load(recipe, options.overrides), options.ranks)
        if unknown := [name for name in options.only or () if name not in known]:
            parser.error(f"--only {unknown[0]!r} is no switch; choose from {', '.join(known)}")
        print(f"{'on over off':30}{'samples/s':>10}{'of the repeats':>18}{'memory':>9}", flush=True)
        rows = []
        for name in options.only or known:
            rows.append(tried(name, known[name], recipe, options))
            print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A training step: ours against open_clip's trainer, on the same towers, shards, batch and augmentation.

    python -m tools.bench.step                                      # CPU, two ranks, float32 and bf16
    python -m tools.bench.step --images FOLDER --captions JSON      # photos as tools/data/captions.py takes them
    python -m tools.bench.step --model VIT.json --batch 32          # other towers, in open_clip's own format

Ours is `torchrun -m mvpretrain train` with kind ddp; theirs is `open_clip_train.main` with --local-loss and
--gather-with-grad, the flags that give it the true gradient. Both clip gradients at 1, crop at random from 90 % of the
area, have one loader worker a rank, and log every step. Every run is in processes of its own, the sides in turn; a
side's figure is the median of its steady steps. Memory is read from /proc while they run: of a rank VmHWM, the larger
of the two; of loader workers what each holds alone, summed. Ratios are ours over theirs. The losses are means of the
last step's, from different initial weights: they should be near each other, and near log(batch).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from mvpretrain.shards.pack import write_splits
from tools.data.captions import load

MODEL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 192, "head_width": 64, "layers": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
}
NAME = "bench-step"  # under which open_clip finds the model
ROOT = Path(__file__).resolve().parents[2]
RANKS, SHARDS = 2, 4
# The first steps also start the loader and the optimiser's state; in the last ones their loader has nothing left to do.
SKIPPED, LAST = 3, 2
LINE = re.compile(r"Batch \(t\): [\d.]+, ([\d.]+)/s,.* Loss: ([\d.]+)")


class Outcome(NamedTuple):
    """One run of one side."""

    rates: list[float]  # samples/s of the steady steps
    rank: float  # MiB, peak of the rank that had most
    workers: float  # MiB, peak of the sum over loader workers
    loss: float
    phases: dict[str, float]  # median milliseconds a step; only ours tells


def photographs(count: int) -> Iterator[tuple[bytes, str]]:
    """Synthetic photos of 640 x 480 with as much detail as a JPEG of 100 to 200 kB has, and a caption."""
    make = np.random.default_rng(0)
    for i in range(count):
        layers = [make.integers(0, 255, (12 * n, 16 * n, 3), dtype=np.uint8) for n in (1, 4, 40)]
        scaled = [np.asarray(Image.fromarray(x).resize((640, 480), Image.Resampling.BICUBIC), float) for x in layers]
        stream = io.BytesIO()
        mixed = 0.6 * scaled[0] + 0.2 * scaled[1] + 0.2 * scaled[2]
        Image.fromarray(mixed.astype(np.uint8)).save(stream, "JPEG", quality=90)
        yield stream.getvalue(), f"a synthetic photo, number {i}, of nothing in particular on a coloured ground"


def captioned(images: Path, captions: Path) -> Iterator[tuple[bytes, str]]:
    for name, texts in load(captions).items():
        data = (images / name).read_bytes()
        yield from ((data, text) for text in texts["captions"])


def make_shards(options: argparse.Namespace, out: Path) -> list[str]:
    """Tars with all samples that a run draws, repeated under new keys where there are fewer."""
    given = options.images and options.captions
    pairs = list(captioned(options.images, options.captions) if given else photographs(64))
    needed = max(options.steps * options.batch * RANKS, SHARDS)
    samples = (
        {"__key__": f"{i:06d}", "jpg": data, "txt": text}
        for i, (data, text) in ((i, pairs[i % len(pairs)]) for i in range(needed))
    )
    return [str(p) for p in write_splits(out, {"train": samples}, -(-needed // SHARDS))["train"].shards]


def ours(
    folder: Path, shards: list[str], model: dict[str, Any], precision: str, options: argparse.Namespace
) -> list[str]:
    tower = {"kind": "openclip", "config": model}
    recipe = {
        "run": str(folder / "run"),
        "data": {"kind": "shards", "train": shards},
        "views": {
            "image": {"kind": "image", "size": model["vision_cfg"]["image_size"], "augment": "clip"},
            "text": {"kind": "text", "tokenizer": "openclip:ViT-B-32", "length": model["text_cfg"]["context_length"]},
        },
        "towers": {v: {"encoder": tower | {"modality": v}, "head": {"layers": 0}} for v in ("image", "text")},
        "objective": {"kind": "infonce"},
        "dim": model["embed_dim"],
        "batch": options.batch * RANKS,
        "steps": options.steps,
        "loader": {"workers": 1},
        "optimizer": {"lr": 5e-4, "weight_decay": 0.2, "options": {"betas": [0.9, 0.98], "eps": 1e-6}},
        "engine": {"kind": "ddp", "precision": precision, "device": "cpu", "ranks": RANKS, "clip": 1.0},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["-m", "mvpretrain", "train", str(folder / "recipe.yaml")]


def theirs(
    folder: Path, shards: list[str], model: dict[str, Any], precision: str, options: argparse.Namespace
) -> list[str]:
    (folder / f"{NAME}.json").write_text(json.dumps(model))
    settings = {
        "model": NAME,
        "train-data": "::".join(shards),
        "train-num-samples": options.steps * options.batch * RANKS,
        "batch-size": options.batch,
        "epochs": 1,
        "workers": 1,
        "lr": 5e-4,
        "wd": 0.2,
        "warmup": 0,
        "grad-clip-norm": 1.0,
        "precision": {"fp32": "fp32", "bf16": "amp_bfloat16"}[precision],
        "device": "cpu",
        "log-every-n-steps": 1,
        "logs": str(folder),
        "name": "run",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    # In a file: torchrun would take --logs for a beginning of options of its own.
    given = folder / "arguments.json"
    given.write_text(json.dumps([*flags, "--local-loss", "--gather-with-grad"]))
    return ["-m", "tools.bench.step", "--open-clip", str(folder / f"{NAME}.json"), str(given)]


def their_trainer(model: str, arguments: list[str]) -> None:
    """Their trainer in this process, with the two changes that it needs on CPUs and with webdataset from 1.0 on."""
    import open_clip
    import torch.nn.parallel
    from open_clip_train import data

    wrapped, expand = torch.nn.parallel.DistributedDataParallel, data.tar_file_expander
    # DDP refuses device_ids on CPUs.
    torch.nn.parallel.DistributedDataParallel = lambda m, device_ids, **more: wrapped(m, **more)  # type: ignore
    # webdataset marks each shard's end by an empty sample, of which their grouping by keys knows nothing.
    data.tar_file_expander = lambda *args, **more: expand(*args, eof_value=None, **more)
    open_clip.add_model_config(model)
    sys.argv = ["open_clip_train.main", *arguments]
    runpy.run_module("open_clip_train.main", run_name="__main__")
    sys.stderr.flush()
    os._exit(0)  # torch with gloo sometimes aborts in the interpreter's own shutdown


def measured(
    side: str, precision: str, shards: list[str], model: dict[str, Any], options: argparse.Namespace
) -> Outcome:
    """One run in fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rank, workers, said = launched(SIDES[side](folder, shards, model, precision, options), folder)
        found, phases = logged(folder / "run" / "log.jsonl") if side == "ours" else (LINE.findall(said), {})
    rates, losses = [float(r) for r, _ in found], [float(x) for _, x in found]
    if len(rates) != options.steps:
        raise SystemExit(f"tools.bench.step: {side} logged {len(rates)} steps of {options.steps}:\n{said[-3000:]}")
    return Outcome(rates[SKIPPED:-LAST], rank, workers, losses[-1], phases)


def launched(command: list[str], folder: Path) -> tuple[float, float, str]:
    """(MiB of a rank, MiB of workers, all that was said) of a run to its end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // RANKS)), "PYTHONPATH": path}
    with (folder / "output").open("w+") as output:
        running = subprocess.Popen(
            [*launcher, *command],
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, **own},
        )
        rank, workers = watched(running)
        output.seek(0)
        said = output.read()
    if running.returncode:
        raise SystemExit(f"tools.bench.step: {' '.join(command[:3])} failed:\n{said[-3000:]}")
    return rank, workers, said


def logged(path: Path) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """(samples/s and loss of each step, median milliseconds of a steady step by phase) of our log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    phases = {
        key.removeprefix("time/"): [line[key] for line in lines[SKIPPED:-LAST]] for key in lines[0] if "time/" in key
    }
    steps = [(line["samples/s"], line["loss"]) for line in lines]
    return steps, {phase: statistics.median(times) for phase, times in phases.items()}


SIDES = {"ours": ours, "open_clip": theirs}


def watched(running: subprocess.Popen[bytes]) -> tuple[float, float]:
    """(largest VmHWM of a rank, largest sum of what workers hold alone) until the launcher ends, in MiB."""
    rank = workers = 0.0
    while running.poll() is None:
        ranks = children(running.pid)
        rank = max([rank, *(field(f"/proc/{p}/status", "VmHWM") for p in ranks)])
        below = [w for p in ranks for w in children(p)]
        held = (field(f"/proc/{w}/smaps_rollup", "Private_(?:Dirty|Clean)") for w in below)
        workers = max(workers, sum(held))
        time.sleep(0.3)
    return rank, workers


def children(pid: int) -> list[int]:
    """The processes that this one has started, from whichever of its threads; none where it has ended."""
    try:
        lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(p) for one in lists for p in one.split()]


def field(path: str, name: str) -> float:
    """MiB in the lines of this name, summed; 0 where the process has ended."""
    try:
        text = Path(path).read_text()
    except OSError:
        return 0.0
    return sum(map(int, re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE))) / 1024


def table(precision: str, found: dict[str, list[Outcome]]) -> None:
    print(f"\n{precision}{'samples/s':>20}{'spread':>16}{'MiB a rank':>12}{'MiB workers':>13}{'loss':>9}", flush=True)
    lines = {}
    for side, runs in found.items():
        rates = [r for run in runs for r in run.rates]
        rank, workers = max(run.rank for run in runs), max(run.workers for run in runs)
        lines[side] = (statistics.median(rates), rank, workers)
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        loss = statistics.mean(run.loss for run in runs)
        print(f"{side:12}{lines[side][0]:12.1f}{spread:>16}{rank:12.0f}{workers:13.0f}{loss:9.3f}")
    speed, rank, workers = (a / b for a, b in zip(lines["ours"], lines["open_clip"]))
    print(f"{'ratio':12}{speed:12.2f}{'':16}{rank:12.2f}{workers:13.2f}")
    phases = {phase: statistics.mean(run.phases[phase] for run in found["ours"]) for phase in found["ours"][0].phases}
    print("ours, ms a step:", ", ".join(f"{phase} {time:.0f}" for phase, time in phases.items()), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--open-clip"]:
        their_trainer(given[1], json.loads(Path(given[2]).read_text()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help=f"a run, of which {SKIPPED + LAST} do not count")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--batch", type=int, default=64, help="rows a rank")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--images", type=Path, help="folder of photos; without it they are synthetic")
    parser.add_argument("--captions", type=Path, help="their captions, COCO's JSON or {file name: [captions]}")
    parser.add_argument("--model", type=Path, help="open_clip's model config; without it a small ViT/16 at 224 pixels")
    options = parser.parse_args(given)
    if options.steps <= SKIPPED + LAST:
        parser.error(
            f"--steps {options.steps}: {SKIPPED + LAST} steps do not count; give at least {SKIPPED + LAST + 1}"
        )
    if not importlib.util.find_spec("pandas"):
        parser.error('open_clip\'s trainer reads tables, and pandas is not installed: pip install "pandas>=2"')
    model = json.loads(options.model.read_text()) if options.model else MODEL
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(options, Path(folder) / "shards")
        for precision in options.precision:
            found: dict[str, list[Outcome]] = {side: [] for side in SIDES}
            for _ in range(options.repeats):
                for side, runs in found.items():
                    runs.append(measured(side, precision, shards, model, options))
            table(precision, found)


if __name__ == "__main__":
    main()

"""`unchanged`, the runs: small trainings by the command, resumed, exported and embedded, on both sides."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.compare.runs import Group, compare, folders
from tools.compare.unchanged_sides import ROOT, Job, Side, python, run

STEPS, HALF = 12, 6
RECIPE = ROOT / "recipes/mfeat.yaml"
MAKERS = ("tools/data/mfeat.py", "tools/data/make_mfeat.py", "tools/make_mfeat.py")  # where the tool is or was
WIDTHS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
COMMON = [
    *(f"steps={STEPS}", "epochs=null", "batch=64", "schedule.warmup=2", "loader.workers=1"),
    *("engine.device=cpu", "engine.threads=1", "log={every: 1, tensorboard: false}"),
    *(f"checkpoint={{every: {HALF}, keep: 9}}", f"evaluation={{every: {HALF}, limit: 100}}"),
]
TWO_VIEWS = [
    "views={fou: {kind: vector, field: fou.npy, dim: 76, augment: {noise: 0.2}}, "
    "fac: {kind: vector, field: fac.npy, dim: 216, augment: {noise: 0.2, dropout: 0.1}}}",
    "towers={fou: {encoder: {kind: mlp, input: 76, dropout: 0.1}, head: {layers: 2, norm: batch}}, "
    "fac: {encoder: {kind: mlp, input: 216}}}",
]
MIXED = [
    "data={kind: synthetic, samples: 256, eval_samples: 64, missing: {wav: 0.2, txt: 0.1}}",
    "views={image: {kind: image, size: 16, augment: simclr, normalize: half, tower: image}, "
    "again: {kind: image, size: 16, augment: simclr, normalize: half, tower: image}, "
    "audio: {kind: audio, rate: 8000, seconds: 0.5, window: 256, hop: 128, mels: 16, augment: specaugment}, "
    "series: {kind: series, channels: 3, length: 32, augment: {crop: 0.8, jitter: 0.1}}, "
    "text: {kind: text, length: 24}}",
    "towers={image: {encoder: {kind: vit, image_size: 16, width: 24, depth: 1, heads: 2, dropout: 0.1}}, "
    "audio: {encoder: {kind: series, channels: 16, strides: [2], width: 24, depth: 1, heads: 2}}, "
    "series: {encoder: {kind: series, channels: 3, strides: [2], width: 24, depth: 1, heads: 2}}, "
    "text: {encoder: {kind: transformer, length: 24, width: 24, depth: 1, heads: 2}, head: {layers: 2}}}",
    *("batch=32", "loader.workers=2", "evaluation.by_label=[text]", "objective={kind: infonce}"),
]


class Run(NamedTuple):
    """A training that both sides do."""

    name: str
    ranks: int
    overrides: list[str]
    resumed: bool = False  # whether it is also stopped half-way and resumed
    exported: bool = False


RUNS = (
    Run("none", 1, ["engine.kind=none", "loader.workers=0"], exported=True),
    Run("mixed views", 1, ["engine.kind=none", *MIXED], resumed=True, exported=True),
    Run("DDP x 2", 2, ["engine.kind=ddp"]),
    Run("ZeRO-2 x 2", 2, ["engine.kind=zero2"], resumed=True),
    Run(
        "teacher and queue, DDP x 2",
        2,
        [
            *("engine.kind=ddp", "teacher={momentum: 0.9, queue: 96}", *TWO_VIEWS),
            "objective={kind: infonce, pairs: [[fou, fac@teacher], [fac, fou@teacher]]}",
        ],
    ),
    Run(
        "fastclip v2 in micro-batches, DDP x 2",
        2,
        ["engine.kind=ddp", "engine.micro_batch=12", "objective={kind: fastclip, variant: v2, rho: 2.0}"],
        resumed=True,
    ),
)


def runs(both: Sequence[Side], data: Path, scratch: Path) -> Iterator[Group]:
    """The groups of every run, of what became of it, and of the shards that all of them read."""
    shards = made_shards(data, scratch)
    for side in both:
        (side.folder / "resumed").mkdir()
    for one in RUNS:
        folder = one.name.replace(" ", "-").replace(",", "")
        run([Job(f"train {one.name}", side, train(one, folder, shards), side.folder) for side in both])
        yield from by_noun(f"run {one.name}", compare(*(side.folder / folder for side in both)))
        if one.resumed:
            yield from resumed(both, one, folder, shards)
        if one.exported:
            yield from exported(both, one, folder, shards)


def by_noun(what: str, groups: Sequence[Group]) -> Iterator[Group]:
    """One group for each kind of thing, all checkpoints together."""
    nouns = dict.fromkeys(group.noun.partition(" of step-")[0] for group in groups)
    for noun in nouns:
        yield joined(f"{what}: {noun}", [group for group in groups if group.noun.partition(" of step-")[0] == noun])


def joined(noun: str, groups: Sequence[Group]) -> Group:
    """Several groups as one, whose names say which of them they were in."""
    differences = {f"{group.noun}: {name}": d for group in groups for name, d in group.differences.items()}
    return Group(noun, differences, {f"{group.noun}: {name}" for group in groups for name in group.lonely})


def train(one: Run, folder: str, shards: Path, *more: str) -> list[str]:
    """The command that does a run, relative to the side's folder, so that both sides' recipes are the same."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(one.ranks)] if one.ranks > 1 else []
    )
    data = [f"data.train={shards}/train-*.tar", f"data.eval={shards}/test-*.tar"]
    settings = [f"run={folder}", *data, *COMMON, *one.overrides]
    return python(*launcher, "-m", "mvpretrain", "train", str(RECIPE), *settings, *more)


def resumed(both: Sequence[Side], one: Run, folder: str, shards: Path) -> Iterator[Group]:
    """Each side's run as if it had been killed half-way, and resumed: against the whole one, and against each other."""
    for side in both:
        ignore = shutil.ignore_patterns(f"step-{STEPS:08d}")
        shutil.copytree(side.folder / folder, side.folder / "resumed" / folder, ignore=ignore)
    command = train(one, folder, shards, "--resume")
    run([Job(f"resume {one.name}", side, command, side.folder / "resumed") for side in both])
    again = [side.folder / "resumed" / folder for side in both]
    yield joined(f"run {one.name}, resumed", compare(*again))
    for side, path in zip(both, again):
        yield joined(f"run {one.name}, resumed against whole, {side.name}", compare(side.folder / folder, path))


def exported(both: Sequence[Side], one: Run, folder: str, shards: Path) -> Iterator[Group]:
    """The run's export and, of one that was trained on shards, the embeddings of its held-out part."""
    out = f"{folder}-export"
    command = python("-m", "mvpretrain", "export", folder, out)
    run([Job(f"export {one.name}", side, command, side.folder) for side in both])
    yield joined(f"run {one.name}: export", folders("its export", *(side.folder / out for side in both)))
    if any("synthetic" in override for override in one.overrides):
        return
    rows = f"{folder}-rows"
    command = python("-m", "mvpretrain", "embed", out, f"{shards}/test-*.tar", rows)
    run([Job(f"embed {one.name}", side, command, side.folder) for side in both])
    yield joined(f"run {one.name}: embeddings", folders("its rows", *(side.folder / rows for side in both)))


def made_shards(data: Path, scratch: Path) -> Path:
    """Shards of six vector views, written once by this tree's tool; of made-up numbers where the data is not there."""
    if not data.is_dir():
        print(f"no folder {data}: the runs are on made-up numbers", flush=True)
        data = made_up(scratch / "made-up")
    tool = next((path for path in MAKERS if (ROOT / path).is_file()), None)
    if tool is None:
        raise ValueError(f"none of {', '.join(MAKERS)} is there; add the tool's new path to MAKERS")
    start = ["-m", tool.removesuffix(".py").replace("/", ".")] if (ROOT / tool).parent.name == "data" else [tool]
    done = subprocess.run([sys.executable, *start, str(data), str(scratch / "shards")], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{tool} ended with code {done.returncode}:\n{done.stderr.decode()[-2000:]}")
    return scratch / "shards"


def made_up(folder: Path, rows: int = 600) -> Path:
    """Tables as those of the Multiple Features data set, of random numbers around ten classes' centres."""
    folder.mkdir()
    random = np.random.default_rng(0)
    labels = np.arange(rows) % 10
    for view, width in WIDTHS.items():
        table = random.standard_normal((10, width))[labels] + random.standard_normal((rows, width))
        header = ",".join([*(f"x{i}" for i in range(width)), "label"])
        whole = np.column_stack([table, labels])
        np.savetxt(folder / f"mfeat-{view}.csv", whole, delimiter=",", header=header, comments="", fmt="%.6f")
    return folder

"""The program as it is typed: every mistake is one sentence with its value and a remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvpretrain.training import train
from tests.cli.conftest import RECIPE, Program


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails where a run gets as far as its process group, whose ranks may wait for one another for minutes."""

    def start(_: object) -> None:
        raise AssertionError("the process group was started")

    monkeypatch.setattr(train, "start", start)


def files() -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in Path().rglob("*") if p.is_file()}


def refused(program: Program, *arguments: str, words: list[str], code: int = 2) -> None:
    """The command ends with the code and one line on stderr that holds the words; no file is new, changed or gone."""
    before = files()
    ended = program(*arguments)
    assert ended.code == code, ended
    assert ended.err.startswith("mvpretrain: ") and ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.out + ended.err
    for word in words:
        assert word in ended.err, ended.err
    assert files() == before


def crafted(place: str, **meta: object) -> None:
    """A checkpoint, as far as anyone looks before loading it, in the folder of a run."""
    folder = Path(place) / "checkpoints/step-00000002"
    folder.mkdir(parents=True)
    whole = {"size": 1, "kind": "none", "batch": 8, "step": 2, "cursor": [2, [16]], "skipped": {}, "metrics": {}}
    (folder / "meta.json").write_text(json.dumps(whole | meta))
    (Path(place) / "recipe.yaml").write_text(RECIPE)


SHARDS = "data={kind: shards, train: 'nothing/s-{000..003}.tar'}"
TRAIN = {  # what is typed after `mvpretrain train`, and words of the sentence
    "unknown key": (["r.yaml", "stepz=4"], ["unknown key 'stepz'", "did you mean 'steps'"]),
    "unknown key inside": (["r.yaml", "engine.presicion=fp32"], ["engine", "'presicion'", "did you mean 'precision'"]),
    "no recipe": (["missing.yaml"], ["no recipe at 'missing.yaml'", "give a YAML file"]),
    "missing shards": (["r.yaml", SHARDS], ["nothing/s-000.tar' and 3 more of 4", "mvpretrain shards pack"]),
    "half an override": (["r.yaml", "steps"], ["override 'steps'", "key.sub=value"]),
    "unquoted braces": (["r.yaml", "data={train: x-{0..3}.tar}"], ["x-{0..3}.tar", "quote"]),
    "no such open_clip model": (
        ["r.yaml", "towers.a.encoder={kind: openclip, modality: image, model: ViT-B-33}"],
        ["unknown open_clip model 'ViT-B-33'", "nearest: ViT-B-32"],
    ),
    "no such timm model": (
        ["r.yaml", "towers.a.encoder={kind: timm, model: resnet19}"],
        ["unknown timm model 'resnet19'", "nearest: resnet18"],
    ),
    "no such kind": (["r.yaml", "towers.a.encoder.kind=mpl"], ["encoder kind 'mpl'", "did you mean 'mlp'"]),
    "no such optimiser": (["r.yaml", "optimizer.kind=adamm"], ["optimizer kind 'adamm'", "did you mean 'adam'"]),
    "view without an encoder": (
        ["r.yaml", "views.c={kind: vector, field: c, dim: 4}"],
        ["view 'c' has no encoder", "add towers.c"],
    ),
    "objective of a view that is not there": (
        ["r.yaml", "objective.pairs=[[a, z]]"],
        ["unknown view in objective.pairs 'z'", "known: a, b"],
    ),
    "batch of one": (["r.yaml", "batch=1"], ["batch", "greater than or equal to 2, got 1"]),
    "batch over ranks": (["r.yaml", "engine.ranks=3"], ["batch=8", "engine.ranks=3"]),
    "offload without ZeRO": (["r.yaml", "engine.offload=true"], ["engine.offload", "kind=none", "set zero1"]),
    "run that is there": (["r.yaml", "run=held"], ["held already holds step-00000002", "--resume", "run=OTHER"]),
}


@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry-run"])
@pytest.mark.parametrize("mistake", TRAIN)
def test_train_refuses(program: Program, mistake: str, dry: bool) -> None:
    crafted("held")
    arguments, words = TRAIN[mistake]
    refused(program, "train", *arguments, *(["--dry-run"] if dry else []), words=words)


@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry-run"])
def test_held_out_shards_that_are_missing_are_found_before_anything_is_written(program: Program, dry: bool) -> None:
    Path("files").mkdir()
    for i in range(8):
        Path(f"files/{i}.a.json").write_text("[1, 2, 3, 4]")
        Path(f"files/{i}.b.json").write_text("[1, 2, 3, 4]")
    assert program("shards", "pack", "files", "data").code == 0
    words = ["nothing at 'nowhere.tar'", "correct the path"]
    data = "data={kind: shards, train: data/shard-000000.tar, eval: nowhere.tar}"
    fields = ["views.a.field=a.json", "views.b.field=b.json"]
    refused(program, "train", "r.yaml", data, *fields, *(["--dry-run"] if dry else []), words=words)


def test_weights_to_start_from_that_are_missing_or_of_another_model(program: Program) -> None:
    refused(program, "train", "r.yaml", "init=nothing.safetensors", words=["nothing.safetensors", "correct the path"])
    assert program("train", "r.yaml").code == 0
    weights = "init=run/checkpoints/step-00000002/weights.safetensors"
    refused(program, "train", "r.yaml", "run=other", "dim=5", weights, words=["init", "size mismatch"])


def test_a_run_goes_on_with_the_sizes_it_had(program: Program) -> None:
    assert program("train", "r.yaml").code == 0
    refused(program, "train", "run", "--resume", "dim=5", "steps=4", words=["step-00000002", "size mismatch"])


@pytest.mark.usefixtures("no_group")
def test_launcher_that_does_not_fit(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(program, "train", "r.yaml", "engine.ranks=2", words=["engine.ranks=2", "started 1", "torchrun"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(program, "train", "r.yaml", words=["engine.kind=none", "started 3", "set engine.kind=ddp"])
    for dry in ([], ["--dry-run"]):
        words = ["batch is 8 on 3 ranks", "a multiple of the ranks"]
        refused(program, "train", "r.yaml", "engine.kind=ddp", *dry, words=words)


@pytest.mark.usefixtures("no_group")
def test_zero_checkpoint_of_another_world_size(program: Program) -> None:
    crafted("held", kind="zero2", size=2)
    words = ["held/checkpoints/step-00000002", "written by 2 ranks under zero2", "this run has 1", "init="]
    refused(program, "train", "held", "run=held", "engine.kind=zero2", "--resume", words=words)


@pytest.mark.parametrize(("setting", "words"), [
    ("towers.b.encoder={kind: series, width: 128, channels: 2}", ["towers.b.encoder: width 128 cannot be split"]),
    ("towers.b.head.layers=0", ["towers.b.head: a head of 0 layers needs dim equal to the encoder's 8"]),
    ("towers.b.weights=no.safetensors", ["towers.b.weights: 'no.safetensors' is no file"]),
    ("towers.b={freeze: true, train_blocks: 9, encoder: {kind: mlp, input: 4}}", ["towers.b: train_blocks=9, but MLP"]),
])  # fmt: skip
def test_a_tower_that_cannot_be_built_is_named_before_anything_is_printed(
    program: Program, setting: str, words: list[str]
) -> None:
    refused(program, "train", "r.yaml", setting, "--dry-run", words=words)
    assert not program("train", "r.yaml", setting, "--dry-run").out


def test_view_that_does_not_fit_its_encoder(program: Program) -> None:
    words = ["towers.a: mlp encoder takes items of shape (5), got (4,)", "set its input"]
    refused(program, "train", "r.yaml", "towers.a.encoder.input=5", "--dry-run", words=words)
    ended = program("train", "r.yaml", "towers.a.encoder.input=5")
    assert ended.code == 2 and all(word in ended.err for word in words)
    assert program("train", "r.yaml").code == 0  # what the first attempt left is not in the way


def test_zero_without_a_launcher(program: Program, tmp_path: Path) -> None:
    """The one test here that starts a process: this one must not join a process group."""
    command = [sys.executable, "-m", "mvpretrain", "train", "r.yaml", "engine.kind=zero2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run/checkpoints/step-00000002/meta.json").read_text())["kind"] == "zero2"


def test_a_run_whose_loss_is_not_finite_ends_with_3(program: Program) -> None:
    ended = program("train", "r.yaml", "optimizer.lr=1e30", "max_nonfinite=0", "steps=9")
    assert ended.code == 3
    assert ended.err.startswith("mvpretrain: step ") and ended.err.count("\n") == 1
    assert "max_nonfinite=0" in ended.err and "lower optimizer.lr=1e+30" in ended.err


def test_a_run_its_export_and_what_they_refuse(program: Program) -> None:
    """One run through all commands, with the mistakes that each offers on the way."""
    refused(program, "export", "nowhere", "out", words=["no recipe at 'nowhere'"])
    Path("fresh").mkdir()
    Path("fresh/recipe.yaml").write_text(RECIPE)
    refused(program, "export", "fresh", "out", words=["fresh holds no checkpoint", "mvpretrain train fresh"])
    trained = program("train", "r.yaml", "--local_rank=0")
    assert (trained.code, trained.err) == (0, "") and "done: run" in trained.out
    refused(program, "export", "run", "out", "--checkpoint", "7", words=["'7'", "it has step-00000002"])
    refused(program, "export", "run", "out", "--view", "aa", words=["unknown view 'aa'", "did you mean 'a'"])
    assert program("export", "run", "out").code == 0
    refused(program, "export", "run", "out", words=["'out' exists", "give another folder"])
    refused(program, "evaluate", "run", words=["'run' is no export", "mvpretrain export"])
    refused(program, "embed", "out", "nothing.tar", "vectors", words=["nothing at 'nothing.tar'"])
    assert program("evaluate", "out").code == 0 and Path("out/report/report.json").is_file()


def test_dry_run_says_what_it_takes(program: Program) -> None:
    ended = program("train", "r.yaml", "--dry-run", "--memory", "3GiB", "--json", "plan.json")
    assert ended.code == 0 and "predicted peak: " in ended.out and "3,072.0 MiB" in ended.out
    plan = json.loads(Path("plan.json").read_text())
    assert plan["peak"] == max(sum(items.values()) for items in plan["moments"].values())
    assert not Path("run").exists()
    refused(program, "train", "r.yaml", "--dry-run", "--memory", "3 apples", words=["'3 apples'", "write it as 40GiB"])
    refused(program, "train", "r.yaml", "--memory", "3GiB", words=["--memory", "--dry-run"])
    refused(program, "train", "r.yaml", "--json", "plan.json", words=["--json", "--dry-run"])


def test_bench(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvpretrain.profiling.measure.SIDE", {"cpu": 64})
    ended = program("bench", "r.yaml", "--steps", "2", "--warmup", "1", "--json", "bench.json", "--profile", "traces")
    assert (ended.code, ended.err) == (0, "") and "samples/s: " in ended.out
    assert json.loads(Path("bench.json").read_text())["ranks"] == 1 and Path("traces/rank-0.json").is_file()
    assert not Path("run").exists()
    refused(program, "bench", "r.yaml", "--steps", "0", words=["--steps 0", "at least 1 step"])
    refused(program, "bench", "r.yaml", "stepz=0", words=["unknown key 'stepz'"])
    refused(program, "bench", "r.yaml", "--memory", "3GiB", words=["--memory 3GiB", "--find-micro-batch"])
    words = ["'lots'", "write it as 40GiB"]
    refused(program, "bench", "r.yaml", "--find-micro-batch", "--memory", "lots", words=words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(program, "bench", "r.yaml", "--find-micro-batch", words=["starts its ranks itself", "engine.ranks=N"])


CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 96 bytes. 12"


@pytest.mark.parametrize(("error", "reason"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ": out of memory"),
    (RuntimeError(CPU), ": can't allocate memory: you tried 96 bytes"),
])  # fmt: skip
def test_memory_ended(program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def end(*_: object) -> None:
        raise error

    monkeypatch.setattr("mvpretrain.training.train.train", end)
    words = [f"{reason}; `mvpretrain train RECIPE --dry-run` says"]
    refused(program, "train", "r.yaml", words=words, code=4)


def test_shards_from_files_to_a_page(program: Program) -> None:
    refused(program, "shards", "pack", "nowhere", "data", words=["'nowhere' is neither a folder nor a table", "give"])
    Path("files").mkdir()
    refused(
        program, "shards", "pack", "files", "data", words=["no samples in 'files'", "it needs files with an ending"]
    )
    for i in range(8):
        Path(f"files/{i}.txt").write_text(f"text {i}")
        Path(f"files/{i}.json").write_text("[1, 2]")
    assert "8 samples in 1 shard" in program("shards", "pack", "files", "data").out
    refused(program, "shards", "pack", "files", "data", words=["'data' exists", "give another"])
    for command in ("index", "check", "show"):
        refused(program, "shards", command, "no.tar", words=["nothing at 'no.tar'", "mvpretrain shards pack"])
    refused(program, "shards", "show", "data", "--out", "x.gif", words=["'x.gif'", "NAME.html or"])
    refused(program, "shards", "index", "data", "--out", "no/i.json", words=["no/i", "correct the path"])
    refused(program, "shards", "check", "data", "--recipe", "no.yaml", words=["no recipe at 'no.yaml'"])
    assert "8 of 8 samples decode" in program("shards", "check", "data").out
    assert "8 samples in 1 shards: all.json" in program("shards", "index", "data", "--out", "all.json").out
    assert len(json.loads(Path("all.json").read_text())["shardlist"]) == 1
    assert "page.html" in program("shards", "show", "data", "--count", "3", "--out", "page.html").out
    assert Path("page.html").read_text().count("<tr>") == 4


def test_check_ends_with_1_where_shards_are_damaged(program: Program) -> None:
    Path("files").mkdir()
    for i in range(8):
        Path(f"files/{i}.json").write_text("[1, 2]" if i != 3 else "[1, ")
    program("shards", "pack", "files", "data")
    bad = program("shards", "check", "data")
    assert (bad.code, bad.err) == (1, "") and "7 of 8 samples decode" in bad.out
    assert "json: JSONDecodeError: 1" in bad.out and "example 3 in" in bad.out
    whole = Path("data/shard-000000.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[:1300])  # a sample takes two blocks of 512 bytes
    cut = program("shards", "check", "cut.tar")
    assert (cut.code, cut.err) == (1, "") and "tars cut off" in cut.out and "cut.tar" in cut.out


def test_recipes_can_be_looked_at(program: Program) -> None:
    from mvpretrain.recipe import load

    shown = program("recipe", "show", "r.yaml", "steps=7").out
    Path("shown.yaml").write_text(shown)
    assert load("shown.yaml") == load("r.yaml", ["steps=7"])
    assert json.loads(program("recipe", "schema").out)["properties"]["batch"]["minimum"] == 2
    Path("child.yaml").write_text("extends: r.yaml\nobjective: {kind: nowhere:Mine, margin: 2}")
    assert "kind: nowhere:Mine\n  margin: 2\n" in program("recipe", "show", "child.yaml").out
    refused(program, "train", "child.yaml", words=["'nowhere:Mine' cannot be loaded"])
    refused(program, "recipe", "show", "r.yaml", "stepz=7", words=["'stepz'", "did you mean 'steps'"])


def test_what_is_no_command(program: Program) -> None:
    for arguments, word in (
        (["trian"], "'train'"),
        (["train"], "Missing argument"),
        (["train", "r.yaml", "--dry"], "--dry"),
    ):
        ended = program(*arguments)
        assert ended.code == 2 and word in ended.err and "Traceback" not in ended.err

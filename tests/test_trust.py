"""Folders and recipes from elsewhere run no code: every exploit is tried, and leaves no mark."""

from __future__ import annotations

import json
import pickle
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mvpretrain
from mvpretrain import cli, encoders, engine, recipe
from mvpretrain.export.embed import embed
from mvpretrain.export.encoder import load
from mvpretrain.export.write import export_run
from mvpretrain.registry import externals_as_written
from mvpretrain.report.evaluate import evaluate_export
from mvpretrain.shards.check import check
from mvpretrain.shards.index import Index
from mvpretrain.training.train import train
from tests.runs import make_run, make_shards, settings

MODULE = """
from pathlib import Path
from torch import nn, zeros
from mvpretrain.types import View
Path(__file__).with_name("mark").touch()

class Any(nn.Module):
    dim = 3
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, view):
        return self.layer(view.data)
    def blank(self):
        return View(zeros(6))
"""


class Marks:
    """What happened to a mark file, which every exploit here leaves when it works."""

    def __init__(self, folder: Path):
        self.file = folder / "mark"
        self.command = f"pipe:touch {shlex.quote(str(self.file))}"

    def refuses(self, call: Callable[[], Any], *words: str) -> None:
        with pytest.raises(ValueError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value
        assert not self.file.exists()


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marks:
    """A module `outside` on the path, which leaves the mark when it is imported."""
    (tmp_path / "outside.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    return Marks(tmp_path)


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON or YAML file in place."""
    value = yaml.safe_load(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


PLACES = {  # where a recipe may ask for code: the key, and what is written there
    "view": (["views", "left"], {"kind": "outside:Any", "field": "left.npy", "tower": "both"}),
    "encoder": (["towers", "text", "encoder"], {"kind": "outside:Any"}),
    "objective": (["objective"], {"kind": "outside:Any"}),
    "objective in a sum": (["objective"], {"kind": "sum", "terms": [{"objective": {"kind": "outside:Any"}}]}),
    "data source": (["data"], {"kind": "outside:Any"}),
    "logger": (["log"], {"also": [{"kind": "outside:Any"}]}),
    "evaluator": (["evaluation"], {"also": [{"kind": "outside:Any"}]}),
    "optimizer": (["optimizer"], {"kind": "outside:Any"}),
    "DeepSpeed's options": (["engine"], {"options": {"torch_autocast": {"lower_precision_safe_modules": ["a.B"]}}}),
}


def placed(value: dict[str, Any], place: str) -> None:
    *parents, last = PLACES[place][0]
    for key in parents:
        value = value[key]
    value[last] = PLACES[place][1]


@pytest.mark.parametrize("place", PLACES)
def test_a_recipe_in_a_folder_names_no_class(place: str, tmp_path: Path, marks: Marks) -> None:
    run = make_run(tmp_path)
    edited(run / "recipe.yaml", lambda value: placed(value, place))
    wanted = "engine.options" if "options" in place else "'outside:Any'"
    calls = [lambda: mvpretrain.load_recipe(run), lambda: export_run(run, tmp_path / "out")]
    for call in calls:
        marks.refuses(call, wanted, "--trust", "trust=True")
    with externals_as_written():
        shown = yaml.safe_load(recipe.load(run).dump())
    value = shown
    for key in PLACES[place][0]:
        value = value[key]
    assert "outside:Any" in str(value) or "torch_autocast" in str(value)
    assert not marks.file.exists()
    mvpretrain.load_recipe(run, trust=True)
    assert marks.file.exists() == ("outside:Any" in str(value) and place != "optimizer")


def test_the_recipe_file_that_is_typed_may_name_one(tmp_path: Path, marks: Marks) -> None:
    path = tmp_path / "r.yaml"
    value = settings(tmp_path)
    placed(value, "encoder")
    path.write_text(json.dumps(value))
    assert mvpretrain.load_recipe(path).trusted and marks.file.exists()


@pytest.mark.parametrize(
    "words", ["train run", "train run --resume", "train run --dry-run", "bench run", "export run out", "shards check x"]
)
def test_commands_on_a_folder_name_no_class(
    words: str, tmp_path: Path, marks: Marks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    edited(run / "recipe.yaml", lambda value: placed(value, "encoder"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert typed(monkeypatch, *words.split(), *(["--recipe", "run"] if "check" in words else [])) == 2
    said = capsys.readouterr().err
    assert said.startswith("mvpretrain: ") and "'outside:Any'" in said and "--trust" in said and said.count("\n") == 1
    assert typed(monkeypatch, "recipe", "show", "run") == 0 and "outside:Any" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    typed(monkeypatch, *words.split(), "--trust", *(["--recipe", "run"] if "check" in words else []))
    assert marks.file.exists()


def test_deepspeeds_files_are_read_if_this_recipe_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path)
    run = make_run(tmp_path, engine={"kind": "zero2", "device": "cpu"})
    (tmp_path / "r.yaml").write_text((run / "recipe.yaml").read_text())
    meta = {"size": 1, "kind": "zero2", "batch": 8, "step": 10, "cursor": [10, [0]], "skipped": {}, "metrics": {}}
    step = run / "checkpoints/step-00000010"
    (step / "meta.json").write_text(json.dumps(meta))
    (step / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)

    def begin(_: object) -> None:
        raise ValueError("it would begin")

    monkeypatch.setattr(sys.modules["mvpretrain.training.train"], "start", begin)
    for words, sentence in (
        ("train r.yaml --resume", "it would begin"),
        ("train r.yaml steps=20 optimizer.lr=1 --resume", "its recipe differs in steps, optimizer.lr; if you made"),
        ("train r.yaml steps=20 --resume --trust", "it would begin"),
        ("train run --resume", "this recipe was read from a folder; if you made them, add --trust"),
        ("train run --resume --trust", "it would begin"),
    ):
        assert typed(monkeypatch, *words.split()) == 2
        assert sentence in capsys.readouterr().err, words


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `mvpretrain WORDS` in this process."""
    monkeypatch.setattr(engine, "shutdown", sys.exit)  # the real one ends the process without pytest's leave
    monkeypatch.setattr(sys, "argv", ["mvpretrain", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("part", ["preprocessing", "tower"])
def test_an_export_names_no_class(part: str, tmp_path: Path, marks: Marks) -> None:
    make_shards(tmp_path)
    shards = str(tmp_path / "data/train-000000.tar")
    out = export_run(make_run(tmp_path), tmp_path / "out")
    popen = {"kind": "outside:Any", "field": "txt"}

    def change(config: dict[str, Any]) -> None:
        config[part] = popen if part == "preprocessing" else {"encoder": {"kind": "outside:Any"}}

    edited(out / "text/config.json", change)
    words = "'outside:Any'", "--trust"
    marks.refuses(lambda: mvpretrain.load(out, "text"), *words)
    marks.refuses(lambda: mvpretrain.load(out / "text"), *words)
    marks.refuses(lambda: embed(out, shards, tmp_path / "rows"), *words)
    marks.refuses(lambda: evaluate_export(out), *words)
    with pytest.raises(RuntimeError if part == "tower" else AttributeError):  # other weights, no transform
        load(out, "text", trust=True).read("a")
    assert marks.file.exists()


def test_a_recipe_in_a_folder_names_no_command(tmp_path: Path, marks: Marks) -> None:
    make_shards(tmp_path)
    run = make_run(tmp_path)
    out = export_run(run, tmp_path / "out")
    for split, urls in (
        ("eval", marks.command),
        ("eval", f"{tmp_path}/data/eval-000000.tar::{marks.command}"),
        ("train", [marks.command]),
        ("train", [{"urls": marks.command, "weight": 1.0}]),
    ):
        for folder in (run, out):
            edited(folder / "recipe.yaml", lambda value, split=split, urls=urls: value["data"].update({split: urls}))
        marks.refuses(lambda: evaluate_export(out), "'pipe:touch", "--trust")
        marks.refuses(lambda: export_run(run, tmp_path / "other"), "'pipe:touch", "--trust")


@pytest.mark.parametrize("way", ["braces", "a variable", "wids", "an index", "an index in a list"])
def test_commands_that_nobody_spelled_are_not_run(
    way: str, tmp_path: Path, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path)
    tar, cache = str(tmp_path / "data/train-000000.tar"), tmp_path / "cache"
    if way == "braces":
        urls: Any = f"{{{marks.command},{tar}}}"
    elif way == "a variable":
        monkeypatch.setenv("WDS_more", marks.command)
        urls = f"{tar}::${{more}}"
    else:
        urls = str(tmp_path / "index.json")
        Index.scan(tar).save(urls)
        entry = {"url": f"{marks.command}; cat {tar}"}
        if way == "wids":
            (tmp_path / "index.members.npy").unlink()
        edited(tmp_path / "index.json", lambda value: value["shardlist"][0].update(entry))
        urls = [urls] if way == "an index in a list" else urls
    value = settings(tmp_path, engine={"device": "cpu"}, log={"tensorboard": False}, steps=1, evaluation={})
    value["data"] |= {"train": urls, "eval": None, "label": None, "cache": str(cache)}
    (tmp_path / "r.yaml").write_text(json.dumps(value))
    # A trusted recipe that spells no command runs none: as it begins, or when a sample is read
    try:
        train(mvpretrain.load_recipe(tmp_path / "r.yaml", ["loader.max_bad_share=1", "loader.max_bad_in_row=10"]))
    except (ValueError, RuntimeError) as error:
        assert "is not run: if you trust it, write it out" in str(error), error
    else:
        pytest.fail("the run ended without a word")
    if way == "a variable":
        assert "is not run" in str(check(urls, cache=cache).truncated)
    assert not marks.file.exists()


def test_a_command_that_is_spelled_is_run(tmp_path: Path) -> None:
    make_shards(tmp_path)
    spelled = f"pipe:cat {shlex.quote(str(tmp_path))}/data/{{train,eval}}-000000.tar"
    assert len(Index.find(spelled, tmp_path / "cache")) == 91
    assert check([spelled], cache=tmp_path / "cache").samples == 91


@pytest.mark.parametrize("name", ["/{0}/mark", "../mark", ".mark", "a/../../mark", "", 7])
def test_names_of_views_are_names(name: Any, tmp_path: Path) -> None:
    make_shards(tmp_path)
    shards = str(tmp_path / "data/train-000000.tar")
    run = make_run(tmp_path)
    out = export_run(run, tmp_path / "out")
    name = name.format(tmp_path) if isinstance(name, str) else name
    edited(out / "text/config.json", lambda config: config.update(view=name))
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: embed(out, shards, tmp_path / "deep/rows"), lambda: load(out, name)):
        with pytest.raises(ValueError, match="is no name"):
            call()
    edited(run / "recipe.yaml", lambda value: value["views"].update({name: value["views"].pop("text")}))
    if isinstance(name, str):
        with pytest.raises(ValueError, match="is no name"):
            export_run(run, tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before


WEIGHTS = {  # encoders that read a file of weights, which a folder names
    "timm": {"kind": "timm", "model": "resnet10t", "pretrained": "{folder}/w.pth"},
    "timm's own option": {"kind": "timm", "model": "resnet10t", "options": {"checkpoint_path": "{folder}/w.pth"}},
    "openclip": {
        "kind": "openclip",
        "modality": "text",
        "config": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1},
            "text_cfg": {"context_length": 12, "vocab_size": 300, "width": 8, "heads": 1, "layers": 1},
        },
        "pretrained": "{folder}/w.pth",
    },
    "huggingface": {"kind": "huggingface", "folder": "{folder}/model"},
}


@pytest.mark.parametrize("library", WEIGHTS)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickle"])
def test_weights_that_an_export_names_are_not_unpickled(library: str, new: bool, tmp_path: Path) -> None:
    out = export_run(make_run(tmp_path), tmp_path / "out")
    mark, place = tmp_path / "mark", out / "text"
    file = place / "w.pth"
    if library == "huggingface":
        transformers = pytest.importorskip("transformers")
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        transformers.BertConfig(**small, vocab_size=9).save_pretrained(place / "model")
        file = place / "model/pytorch_model.bin"
    state = {"state_dict": Payload(mark)}
    torch.save(state, file) if new else file.write_bytes(pickle.dumps(state, protocol=2))
    edited(place / "config.json", lambda config: config.update(tower={"encoder": WEIGHTS[library]}))
    with pytest.raises(ValueError, match=r"w\.pth|model|checkpoint_path"):
        load(out, "text")
    assert not mark.exists()


@pytest.mark.parametrize("part", ["encoder", "tokenizer"])
def test_code_in_a_folder_of_transformers_is_not_run(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = export_run(make_run(tmp_path), tmp_path / "out", ["text"])
    mark, folder = tmp_path / "mark", out / "text/model"
    folder.mkdir()
    (folder / "outside.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: ...\n")
    mapped = {"model_type": "mine", "auto_map": {"AutoConfig": "outside.Mine", "AutoTokenizer": ["outside.Mine", None]}}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(mapped | {"tokenizer_class": "Mine"}))

    def change(config: dict[str, Any]) -> None:
        if part == "encoder":
            config["tower"] = {"encoder": {"kind": "huggingface", "folder": "{folder}/model"}}
        else:
            config["preprocessing"]["tokenizer"] = "huggingface:{folder}/model"

    edited(out / "text/config.json", change)
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        load(out)
    assert not mark.exists()


def test_attention_code_of_a_hub_is_refused() -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="'kernels-community/flash-attn', code of a hub"):
        encoders.build(
            {"kind": "huggingface", "config": config | {"attn_implementation": "kernels-community/flash-attn"}}
        )


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([Payload(tmp_path / "mark")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        encoders.build({"kind": "timm", "model": "vit_tiny_patch16_224", "pretrained": str(tmp_path / "w.npy")})
    assert not (tmp_path / "mark").exists()

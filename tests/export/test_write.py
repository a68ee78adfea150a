"""Exports read back by themselves, refused where they would differ, and free of the training libraries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mvpretrain import recipe
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.export.encoder import load
from mvpretrain.export.formats import own
from mvpretrain.export.write import export_run
from mvpretrain.types import Batch, View
from mvpretrain.views.vector import VectorConfig
from tests.runs import VECTOR, make_run, settings

ROOT = Path(__file__).parents[2]


def of_task(run: Path, step: int, view: str, data: torch.Tensor) -> torch.Tensor:
    """What the run's own task makes of one view's rows."""
    task = recipe.load(run).task(SingleProcess()).eval()
    task.load_state_dict(load_file(run / f"checkpoints/step-{step:08d}/weights.safetensors"))
    rows = len(data)
    text = View(torch.zeros(rows, 12, dtype=torch.int64), torch.ones(rows, 12, dtype=torch.bool))
    views = {"left": View(torch.zeros(rows, VECTOR)), "right": View(torch.zeros(rows, VECTOR)), "text": text}
    views[view] = View(data)
    present = {v: torch.ones(rows, dtype=torch.bool) for v in views}
    with torch.no_grad():
        return task.encode(Batch(views, torch.arange(rows), present, torch.zeros(rows))).z[view]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.mark.parametrize(("checkpoint", "step"), [("last", 10), ("best", 5), ("5", 5), (10, 10)])
def test_export_embeds_as_the_run_does(run, tmp_path, capsys, checkpoint, step):
    out = export_run(run, tmp_path / "out", checkpoint=checkpoint)
    assert out == tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "left", "recipe.yaml", "right", "text"]
    raw = [np.random.default_rng(i).standard_normal(VECTOR) for i in range(7)]
    rows = torch.tensor(np.array(raw), dtype=torch.float32)
    for view, data in (("left", rows / 2), ("right", rows)):
        found = load(out, view).embed(raw, batch=3)
        torch.testing.assert_close(found, of_task(run, step, view, data), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(7))
    said = capsys.readouterr().out
    assert all(f"{view}: read back" in said for view in ("left", "right", "text"))


def test_a_tower_starts_from_an_exported_view_and_refuses_another_one(run, tmp_path):
    out = export_run(run, tmp_path / "out", views=["text"])
    task = recipe.load(run, [f"towers.text.weights={out}/text/model.safetensors"]).task(SingleProcess())
    wanted = load_file(out / "text/model.safetensors")
    for name, value in task.towers["text"].state_dict().items():
        assert torch.equal(value, wanted[name]), name
    with pytest.raises(ValueError, match=r"towers\.\w+\.weights=.*is of another encoder or head"):
        recipe.load(run, [f"towers.both.weights={out}/text/model.safetensors"]).task(SingleProcess())
    with pytest.raises(ValueError, match=r"towers\.text\.weights: 'nothing\.safetensors' is no file"):
        recipe.load(run, ["towers.text.weights=nothing.safetensors"]).task(SingleProcess())


def test_several_heads_round_trip_and_are_said(tmp_path):
    run = make_run(tmp_path, objective={"kind": "amcl", "heads": 2, "width": 4}, dim=3)
    out = export_run(run, tmp_path / "out")
    config = json.loads((out / "text/config.json").read_text())
    assert (config["dim"], config["heads"]) == (6, 2)  # the rows' width, and of how many heads it is
    rows = torch.randn(7, VECTOR)
    found = load(out, "right").embed(list(rows.numpy()))
    torch.testing.assert_close(found, of_task(run, 10, "right", rows), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.unflatten(1, (2, 3)).norm(dim=2), torch.full((7, 2), 0.5**0.5))
    wanted = load_file(out / "text/model.safetensors")
    weights = f"towers.text.weights={out}/text/model.safetensors"
    task = recipe.load(run, [weights]).task(SingleProcess())
    assert all(torch.equal(value, wanted[name]) for name, value in task.towers["text"].state_dict().items())
    with pytest.raises(ValueError, match="is of another encoder or head"):
        recipe.load(run, [weights, "objective={kind: infonce}"]).task(SingleProcess())


def test_one_view_by_its_folder_alone_and_from_elsewhere(run, tmp_path):
    out = export_run(run, tmp_path / "out", views=["text"])
    words = ["a photo", b"of bytes", "x"]
    wanted = load(out).embed(words)
    moved = (tmp_path / "far" / "away").absolute()
    moved.parent.mkdir()
    out.rename(moved)
    (tmp_path / "run").rename(tmp_path / "gone")
    assert torch.equal(load(moved).embed(words), wanted)
    assert torch.equal(load(moved / "text").embed(words), wanted)
    path = tmp_path / "note.txt"
    path.write_text("a photo")
    torch.testing.assert_close(load(moved).embed([path]), wanted[:1])


def test_module_surface(run, tmp_path):
    exported = load(export_run(run, tmp_path / "out"), "left")
    view = View(torch.randn(4, VECTOR))
    assert exported.features(view).shape == (4, exported.width) == (4, 16)
    assert exported(view).shape == (4, exported.dim) == (4, 5)
    assert not exported.training and all(p.requires_grad for p in exported.parameters())
    assert exported.tower.config.lr is None and not exported.tower.config.freeze
    exported(view).sum().backward()
    assert any(p.grad is not None for p in exported.parameters())
    exported.train()
    raw = [np.ones(VECTOR, dtype=np.float32)] * 3
    first = exported.embed(raw)
    assert exported.training and torch.equal(first, exported.embed(raw)) and not first.requires_grad
    assert exported.embed([]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"takes a list of values, got one str; write embed\(\[value\]\)"):
        exported.embed("word")
    with pytest.raises(ValueError, match="dim is 6"):
        exported.embed([np.ones(3)])


def test_card_and_settings(run, tmp_path):
    out = export_run(run, tmp_path / "out", views=["left", "text"])
    card = (out / "README.md").read_text()
    words = ["library_name: mvpretrain", 'mvpretrain.load("out", view="left")', "step-00000010", "`infonce`"]
    words += ["train-000000.tar", "| text | text | transformer | 8 | 5 |", "retrieval/mean/R@1: 0.1000"]
    assert all(word in card for word in words), card
    config = json.loads((out / "left/config.json").read_text())
    assert config["format"] == 1 and config["view"] == "left" and config["dim"] == 5
    assert str(tmp_path) not in (out / "left/config.json").read_text()
    assert recipe.load(out) == recipe.load(run)


def test_mistakes_are_refused_and_leave_nothing(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown view 'txt'; did you mean 'text'"):
        export_run(run, out, views=["txt"])
    with pytest.raises(ValueError, match="no checkpoint '7'"):
        export_run(run, out, checkpoint="7")
    with pytest.raises(ValueError, match="no recipe at"):
        export_run(tmp_path / "nowhere", out)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_run(tmp_path / "bare", out)
    assert not out.exists()
    export_run(run, out, views=["left", "text"])
    with pytest.raises(ValueError, match="exists; give another folder"):
        export_run(run, out)
    with pytest.raises(ValueError, match="holds the views left, text; say which one"):
        load(out)
    with pytest.raises(ValueError, match=r"unknown view 'right'; .*known: left, text"):
        load(out, "right")
    with pytest.raises(ValueError, match="is no export"):
        load(tmp_path / "nowhere")
    config = json.loads((out / "left/config.json").read_text())
    (out / "left/config.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="is of export format 9, this version reads 1; a later version"):
        load(out, "left")


class Leaky(VectorConfig):
    """A view whose transform is not wholly in its settings: what the check is there for."""

    def portable(self, folder: Path) -> VectorConfig:
        return VectorConfig.model_validate({**self.model_dump(), "kind": "vector", "mean": 0.3})


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("run", "data"))


def test_view_that_forgets_a_setting_is_caught(run, tmp_path, monkeypatch):
    monkeypatch.setattr(VectorConfig, "portable", Leaky.portable)
    with pytest.raises(ValueError, match="view 'left', read back, embeds otherwise than the run"):
        export_run(run, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_weights_that_are_written_wrongly_are_caught(run, tmp_path, monkeypatch, factor):
    def damaged(weights, path):
        name = next(n for n in weights if n.startswith("encoder"))
        save_file({**weights, name: weights[name] * factor}, path)

    monkeypatch.setattr(own, "save_file", damaged)
    with pytest.raises(ValueError, match="read back, embeds otherwise"):
        export_run(run, tmp_path / "out", views=["text"])
    assert leftovers(tmp_path) == []


def test_checkpoint_of_another_recipe_is_refused(run, tmp_path):
    text = (run / "recipe.yaml").read_text().replace("width: 16", "width: 24")
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="step-00000010 does not fit the recipe of its run"):
        export_run(run, tmp_path / "out")


class Own(nn.Module):
    """A user's transform and encoder by import path, which cannot be drawn."""

    dim = 3

    def __init__(self, scale: float = 1.0, train: bool = False):
        super().__init__()
        self.scale, self.layer = scale, nn.Linear(4, 3)

    def __call__(self, raw):  # type: ignore[override]
        if isinstance(raw, View):
            return self.layer(raw.data.flatten(1))
        return View(self.scale * torch.as_tensor(raw))

    def blank(self) -> View:
        return View(torch.zeros(2, 2))


def test_foreign_views_and_encoders(tmp_path):
    own = {"kind": "tests.export.test_write:Own", "scale": 3.0, "field": "npy"}
    changes = settings(tmp_path)
    views = {"own": own, "text": changes["views"]["text"]}
    towers = {"own": {"encoder": {"kind": "tests.export.test_write:Own"}}, "text": changes["towers"]["text"]}
    run = make_run(tmp_path, views=views, towers=towers, evaluation={})
    exported = load(export_run(run, tmp_path / "out", trust=True), "own", trust=True)
    raw = torch.randn(5, 2, 2)
    wanted = nn.functional.normalize(exported.tower(View(3 * raw)), dim=1)
    torch.testing.assert_close(exported.embed(list(raw)), wanted.detach())


def test_tokenizer_files_travel_with_the_export(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "photo", "of", "cats"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(tmp_path / "words")
    views = settings(tmp_path)["views"]
    views["text"]["tokenizer"] = f"huggingface:{tmp_path / 'words'}"
    out = export_run(make_run(tmp_path, views=views), tmp_path / "out", views=["text"])
    wanted = load(out).embed(["a photo of cats", "cats"])
    shutil.rmtree(tmp_path / "words")
    assert str(tmp_path) not in (out / "text/config.json").read_text()
    out = out.rename(tmp_path / "moved")
    assert torch.equal(load(out).embed(["a photo of cats", "cats"]), wanted)


ALONE = """
import sys
blocked = {"deepspeed", "accelerate", "webdataset", "sklearn", "tensorboard", "matplotlib"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from mvpretrain.export.encoder import load
rows = load(sys.argv[1], view="text").embed(["some", "words"])
assert rows.shape == (2, 5)
assert not blocked & {name.split(".")[0] for name in sys.modules}
training = ("mvpretrain.shards", "mvpretrain.engine", "mvpretrain.objectives")
assert not any(name.startswith(training) for name in sys.modules)
print("alone")
"""


def test_loading_needs_no_training_library(run, tmp_path):
    out = export_run(run, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", ALONE, out], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "alone\n", done.stderr

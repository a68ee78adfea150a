"""One new file each of objective, encoder, view, source, evaluator, logger and export format, in one run.

Once beside the recipe, named by import path; once in the registries' folders, where a file is a kind. Nothing else is
edited.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mvpretrain
from mvpretrain import recipe
from mvpretrain.data import sources
from mvpretrain.export import formats
from mvpretrain.registry import Registry

FILES = {  # registry -> (class, a file with it and with the settings that make it a kind)
    mvpretrain.objectives.registry: ("Distance", """
from typing import Literal
from torch import nn
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.types import Losses

class Distance(nn.Module):
    def __init__(self, views, weight=1.0):
        super().__init__()
        self.views, self.weight = views, weight

    def forward(self, local, gathered):
        a, b = (local.z[v] for v in self.views)
        total = self.weight * (a - b).square().sum(dim=1).mean()
        return Losses(total, {"distance": total.detach()})

class Config(ObjectiveConfig):
    kind: Literal["new_objective"] = "new_objective"
    weight: float = 1.0

    def build(self, views, collectives):
        return Distance(views, self.weight)
"""),
    mvpretrain.encoders.registry: ("Affine", """
from typing import Literal
from torch import nn
from mvpretrain.encoders import EncoderConfig

class Affine(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.dim, self.layer = width, nn.Linear(4, width)

    def forward(self, view):
        return self.layer(view.data)

class Config(EncoderConfig):
    kind: Literal["new_encoder"] = "new_encoder"
    width: int = 3

    def build(self):
        return Affine(self.width)
"""),
    mvpretrain.views.registry: ("Scaled", """
from typing import Literal
import torch
from mvpretrain.types import View
from mvpretrain.views import ViewConfig

class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, raw):
        return View(self.scale * torch.tensor(raw, dtype=torch.float32))

    def blank(self):
        return View(torch.zeros(4))

    @staticmethod
    def sketch(latent):
        return latent[:4]

class Config(ViewConfig):
    kind: Literal["new_view"] = "new_view"
    scale: float = 1.0

    def build(self, train):
        return Scaled(self.scale)

    def sketch(self, latent):
        return Scaled.sketch(latent)
"""),
    sources.registry: ("Drawn", """
from typing import Literal
import numpy as np
from mvpretrain.data.sources import SourceConfig
from mvpretrain.types import Sample

class Drawn:
    name, weight = "drawn", 1.0

    def __init__(self, length, train):
        self.counts, self.ids = np.array([length]), np.arange(length) + 100 * train

    def read(self, i):
        numbers = np.random.default_rng(int(self.ids[i])).normal(size=(2, 4))
        return Sample(int(self.ids[i]), f"{i}", {"x": numbers[0], "y": numbers.sum(axis=0)})

class Config(SourceConfig):
    kind: Literal["new_source"] = "new_source"
    length: int

    def build(self, views, train):
        return [Drawn(self.length, train)]
"""),
    mvpretrain.evaluation.registry: ("Nearness", """
from typing import Literal
from mvpretrain.evaluation import EvaluatorConfig

class Nearness:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, evaluated):
        a, b = evaluated.table.z.values()
        yield "nearness", self.factor * float((a * b).sum(dim=1).mean())
        yield "samples", float(len(evaluated.table.ids))

class Config(EvaluatorConfig):
    kind: Literal["new_evaluator"] = "new_evaluator"
    factor: float = 1.0

    def build(self, task, collectives):
        return Nearness(self.factor)
"""),
    mvpretrain.loggers.registry: ("Kept", """
import json
from typing import Literal
from mvpretrain.loggers import LoggerConfig

class Kept:
    def __init__(self, name):
        self.name, self.records = name, []

    def start(self, info):
        self.path = info.folder / self.name

    def write(self, step, values):
        self.records.append([step, dict(values)])

    def close(self):
        self.path.write_text(json.dumps(self.records))

class Config(LoggerConfig):
    kind: Literal["new_logger"] = "new_logger"
    name: str

    def build(self):
        return Kept(self.name)
"""),
    formats.registry: ("Whole", """
from typing import Literal
import torch
from mvpretrain.export.formats import FormatConfig
from mvpretrain.types import View

class Whole:
    def write(self, folder, trained):
        torch.save({v: (part.tower, part.view) for v, part in trained.items()}, folder / "whole.pt")

    @torch.no_grad()
    def embed(self, folder, view, values):
        tower, settings = torch.load(folder / "whole.pt", weights_only=False)[view]
        transform = settings.build(train=False)
        return torch.nn.functional.normalize(tower(View.stack([transform(value) for value in values])), dim=1)

    def usage(self, name, view):
        return f"torch.load('{name}/whole.pt')['{view}'] is a tower and its view."

class Config(FormatConfig):
    kind: Literal["new_format"] = "new_format"

    def build(self):
        return Whole()
"""),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_no_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other way of a test names its modules alike, and lies in another folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        package, _, file = name.rpartition(".")
        if file.startswith("new_"):
            del sys.modules[name]
            vars(sys.modules[package]).pop(file, None) if package else None


@pytest.fixture(params=["beside the recipe", "in the registry's folder"])
def kinds(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a recipe in `tmp_path/recipes` writes as `kind` for each new part."""
    found = {}
    for registry, (name, text) in FILES.items():
        part = registry.noun.split()[-1]
        if request.param == "beside the recipe":
            folder, found[part] = tmp_path / "recipes", f"new_{part}:{name}"
        else:
            folder, found[part] = tmp_path / registry.package, f"new_{part}"
            package = importlib.import_module(registry.package)
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        folder.mkdir(exist_ok=True)
        (folder / f"new_{part}.py").write_text(text)
    (tmp_path / "recipes").mkdir(exist_ok=True)
    return found


def settings(kinds: dict[str, str], run: Path) -> dict[str, Any]:
    return {
        "run": str(run),
        "data": {"kind": kinds["source"], "length": 8},
        "views": {v: {"kind": kinds["view"], "field": v, "tower": "both", "scale": 0.5} for v in "xy"},
        "towers": {"both": {"encoder": {"kind": kinds["encoder"], "width": 5}}},
        "objective": {"kind": kinds["objective"], "weight": 2.0},
        "dim": 3,
        "batch": 4,
        "steps": 3,
        "loader": {"workers": 0},
        "engine": {"kind": "none", "device": "cpu"},
        "log": {"every": 1, "tensorboard": False, "also": [{"kind": kinds["logger"], "name": "kept.json"}]},
        "evaluation": {"also": [{"kind": kinds["evaluator"], "factor": 10.0}]},
    }


def test_new_parts_of_every_kind_work_from_a_recipe(
    kinds: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipes/r.yaml"
    path.write_text(json.dumps(settings(kinds, tmp_path / "run")))
    run = mvpretrain.train(mvpretrain.load_recipe(path))
    records = json.loads((run / "kept.json").read_text())
    assert [step for step, _ in records] == [1, 2, 3, 3]
    assert records[0][1]["distance"] == records[0][1]["loss"] > records[2][1]["loss"] > 0
    assert records[3][1]["samples"] == 8 and 0 < records[3][1]["nearness"] <= 10

    whole = mvpretrain.export_run(run, tmp_path / "whole", format=kinds["format"], trust=True)
    own = mvpretrain.export_run(run, tmp_path / "own", trust=True)
    assert "is a tower and its view" in (whole / "README.md").read_text()
    values = [[0.1, 0.2, -0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]
    read_back = formats.registry.parse({"kind": kinds["format"]}).build().embed(whole, "x", values)
    view = mvpretrain.load(own, "x", trust=True)
    torch.testing.assert_close(view.embed(values), read_back, rtol=0, atol=1e-6)
    assert read_back.shape == (2, 3)


@pytest.mark.parametrize("kinds", ["in the registry's folder"], indirect=True)
def test_a_new_kinds_settings_are_those_of_a_recipe(kinds: dict[str, str], tmp_path: Path) -> None:
    parsed = recipe.parse(settings(kinds, tmp_path / "run"))
    assert recipe.parse(yaml.safe_load(parsed.dump())) == parsed
    schema = json.dumps(recipe.schema())
    for registry in FILES:
        check_kind(registry, kinds[registry.noun.split()[-1]])
        assert f'"{kinds[registry.noun.split()[-1]]}"' in schema or registry is formats.registry


def check_kind(registry: Registry[Any], kind: str) -> None:
    assert kind in registry.kinds() and registry.config(kind).__module__ == f"{registry.package}.{kind}"
    required = {"name": "n", "length": 1, "field": "x"}
    given = {key: value for key, value in required.items() if key in registry.config(kind).model_fields}
    assert registry.parse({"kind": kind.replace("_", "-"), **given}).kind == kind
    with pytest.raises(ValueError, match="unknown key 'kimd'; did you mean 'kind'"):
        registry.parse({"kind": kind, **given, "kimd": 1})

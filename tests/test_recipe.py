"""Recipes: overrides, round trip, schema, and one clear sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvpretrain import encoders, evaluation, loggers, objectives, recipe, views
from mvpretrain.registry import externals_as_written

BASE = """
run: runs/x
data: {kind: synthetic, samples: 64, eval_samples: 16}
views:
  a: {kind: vector, field: a, dim: 4}
  b: {kind: vector, field: b, dim: 4}
towers:
  a: {encoder: {kind: mlp, input: 4, width: 8}}
  b: {encoder: {kind: mlp, input: 4, width: 8}}
objective: {kind: infonce}
batch: 8
steps: 3
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return path


def test_overrides_reach_every_depth_and_the_dump_reads_back(base):
    found = recipe.load(
        base, ["towers.a.encoder.width=32", "objective.temperature.init=0.5", "run=other", "views.b.std=2"]
    )
    assert found.towers["a"].encoder.width == 32  # type: ignore[attr-defined]
    assert found.run == "other"
    assert found.objective.temperature.init == 0.5  # type: ignore[attr-defined]
    assert recipe.parse(yaml.safe_load(found.dump())) == found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=4", ["stepz", "did you mean 'steps'"]),
        ("objective.temprature=1", ["objective", "temprature", "did you mean 'temperature'"]),
        ("towers.a.encoder.widht=3", ["towers.a.encoder", "widht", "width"]),
        ("objective.kind=infonse", ["objective", "infonse", "did you mean 'infonce'"]),
        ("views.a.kind=imgae", ["views.a", "imgae", "did you mean 'image'"]),
        ("towers.a.encoder={kind: nowhere.module:Thing}", ["nowhere.module:Thing", "cannot be loaded"]),
        ("views.c={kind: vector, field: c, dim: 4}", ["view 'c' has no encoder", "towers.c"]),
        ("towers.c={encoder: {kind: mlp, input: 4}}", ["tower 'c' encodes no view"]),
        ("objective.pairs=[[a, z]]", ["unknown view in objective.pairs 'z'", "known: a, b"]),
        ("objective.pairs=[[a, a]]", ["'a' against itself"]),
        ("objective.weights={a-z: 2}", ["a-z", "known: a-b"]),
        ("objective.temperature={init: 2}", ["min <= init <= max", "init=2"]),
        ("batch=1", ["batch", "greater than or equal to 2", "1"]),
        ("epochs=2", ["either steps or epochs", "steps=3", "epochs=2"]),
        ("engine.ranks=3", ["batch=8", "engine.ranks=3"]),
        ("engine.kind=zero4", ["engine.kind", "zero4", "zero3"]),
        ("evaluation.by_label=[q]", ["evaluation.by_label", "'q'"]),
        ("steps.x=1", ["steps.x=1", "not a group of settings"]),
        ("noequals", ["noequals", "key.sub=value"]),
        ("views={a: {kind: vector, field: a, dim: 4}}", ["two views or more"]),
    ],
)
def test_a_mistake_is_one_sentence_with_the_value_and_the_remedy(base, override, words):
    with pytest.raises(ValueError) as caught:
        recipe.load(base, [override])
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert "pydantic" not in text and "\n" not in text.strip(), text


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*missing\.yaml"):
        recipe.load(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, ")
    with pytest.raises(ValueError, match="is not YAML"):
        recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold a mapping"):
        recipe.load(tmp_path / "list.yaml")


def written(folder: Path, **recipes: str) -> list[Path]:
    """`folder/NAME.yaml` of each text; a folder in a name is written as two underscores."""
    paths = [folder / f"{name.replace('__', '/')}.yaml" for name in recipes]
    for path, text in zip(paths, recipes.values()):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return paths


def test_a_recipe_extends_others_and_says_what_differs(tmp_path: Path) -> None:
    sizes = "batch: 16\nsteps: 5\nschedule: {warmup: 2}"
    child = """
extends: [../base.yaml, sizes.yaml]
steps: 9
towers: {b: {encoder: {width: 16}, lr: 0.5}}
views: {a: {std: 2}}
objective: {kind: dcl}
"""
    parent = BASE.replace("kind: infonce", "kind: infonce, temperature: {init: 0.5}")
    *_, path, grandchild = written(
        tmp_path, base=parent, more__sizes=sizes, more__child=child, last="extends: more/child.yaml\nrun: last"
    )
    found = recipe.load(path, ["seed=3"])
    assert (found.batch, found.steps, found.schedule.warmup, found.seed, found.run) == (16, 9, 2, 3, "runs/x")
    assert found.towers["b"].model_dump(exclude_unset=True) == {
        "encoder": {"kind": "mlp", "input": 4, "width": 16},
        "lr": 0.5,
    }
    assert found.views["a"].model_dump(exclude_unset=True) == {"kind": "vector", "field": "a", "dim": 4, "std": 2}
    assert found.objective == objectives.registry.parse({"kind": "dcl"})  # not infonce's temperature
    assert recipe.load(grandchild, ["seed=3"]) == found.model_copy(update={"run": "last"})
    assert recipe.parse(yaml.safe_load(found.dump())) == found


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("[missing.yaml]", ["no recipe at", "missing.yaml', which", "a.yaml extends"]),
        ("a.yaml", ["extend each other in a circle", "a.yaml -> ", "take one extends out"]),
        ("b.yaml", ["a.yaml -> ", "b.yaml -> ", "c.yaml -> "]),
        ("3", ["a.yaml: extends is a path or a list of paths", "got 3"]),
        ("[list.yaml]", ["list.yaml must hold a mapping"]),
        (".", ["a.yaml extends the folder", "name a recipe's file"]),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, extends: str, words: list[str]) -> None:
    path, *_ = written(
        tmp_path, a=f"extends: {extends}{BASE}", b="extends: [c.yaml]", c="extends: a.yaml\nsteps: 1", list="[1]"
    )
    with pytest.raises(ValueError) as caught:
        recipe.load(path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value
    with pytest.raises(ValueError, match="write what a recipe extends in its file"):
        recipe.load(written(tmp_path, base=BASE)[0], ["extends=c.yaml"])
    written(tmp_path, recipe=f"extends: base.yaml{BASE}")
    with pytest.raises(ValueError, match=r"recipe\.yaml extends other files, as no run's recipe does"):
        recipe.load(tmp_path)


def test_classes_of_a_user_can_be_read_without_importing_them(base: Path) -> None:
    mine = [
        "objective={kind: sum, terms: [{objective: {kind: nowhere.at_all:Mine, margin: 2}}]}",
        "towers.a.encoder={kind: nowhere.at_all:Net, sizes: [1, 2]}",
        "views.b={kind: nowhere.at_all:View, field: b, more: {x: 1}}",
    ]
    for override in mine:
        with pytest.raises(ValueError, match="cannot be loaded"):
            recipe.load(base, [override])
    with externals_as_written():
        found = yaml.safe_load(recipe.load(base, mine).dump())
    assert found["objective"]["terms"][0]["objective"] == {"kind": "nowhere.at_all:Mine", "margin": 2}
    assert found["towers"]["a"]["encoder"] == {"kind": "nowhere.at_all:Net", "sizes": [1, 2]}
    assert found["views"]["b"]["more"] == {"x": 1} and found["views"]["b"]["missing"] == "some"


def test_the_schema_knows_every_kind_and_its_references_resolve() -> None:
    whole = json.loads(json.dumps(recipe.schema()))

    def resolved(node: Any) -> Any:
        for part in node["$ref"].removeprefix("#/").split("/") if "$ref" in node else []:
            node = whole[part] if part == "$defs" else whole["$defs"][part]
        return node

    def walk(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(child)
        if isinstance(node, dict) and "$ref" in node:
            resolved(node)

    walk(whole)
    for module in (views, encoders, objectives, evaluation, loggers):
        found = whole["$defs"][module.registry.noun]["anyOf"]
        kinds = [resolved(one)["properties"]["kind"].get("const") for one in found]
        assert kinds == [*module.registry.kinds(), None], "every kind, and a user's class by its path"
    view, tower = (whole["properties"][name]["additionalProperties"] for name in ("views", "towers"))
    assert resolved(view) is whole["$defs"]["view"]
    assert resolved(resolved(tower)["properties"]["encoder"]) is whole["$defs"]["encoder"]
    assert resolved(whole["properties"]["objective"]) is whole["$defs"]["objective"]
    assert whole["$defs"]["ViTConfig"]["properties"]["patch"]["default"] == 4
    assert resolved(whole["$defs"]["Term"]["properties"]["objective"]) is whole["$defs"]["objective"]
    assert {"required": ["extends"]} in whole["anyOf"]

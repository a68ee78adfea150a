"""Recipes: overrides, round trip, schema, and one clear sentence for each mistake."""

from __future__ import annotations

import json

import pytest
import yaml

from mvpretrain import recipe

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
        ("objective={kind: amcl, heads: 3}", ["dim=128 does not divide into the objective's heads=3", "set dim=129"]),
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


def test_the_schema_knows_every_kind_and_its_references_resolve():
    whole = json.loads(json.dumps(recipe.schema()))

    def references(node):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    for reference in references(whole):
        place = whole
        for part in reference.removeprefix("#/").split("/"):
            assert part in place, reference
            place = place[part]
    assert {"objective-infonce", "view-image", "encoder-vit", "encoder-openclip"} <= whole["$defs"].keys()
    assert whole["$defs"]["encoder-vit"]["properties"]["patch"]["default"] == 4

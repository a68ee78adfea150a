"""Registries find, refuse or load kinds and users' own classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from mvpretrain import objectives, recipe
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ExternalObjective, ObjectiveConfig, registry
from mvpretrain.objectives.infonce import InfoNCE, InfoNCEConfig, Temperature
from mvpretrain.registry import Kind, build_external, import_path
from mvpretrain.types import Embeddings, Losses
from tests.test_recipe import BASE


class Plain:
    """A user's own class; it asks for the views and not for the collectives."""

    def __init__(self, views: Sequence[str], margin: float = 1.0):
        self.views, self.margin = views, margin

    def __call__(self, local: Embeddings, gathered: Embeddings) -> Losses:
        raise NotImplementedError


class Mine(ObjectiveConfig):
    """A user's settings in a user's module."""

    kind: str = "tests.test_registry:Mine"
    margin: float = 0.2

    def build(self, views: Sequence[str], collectives: Collectives) -> Plain:
        return Plain(views, self.margin)


NOT_A_CLASS = 3


def test_a_registry_lists_its_files_and_builds_them():
    assert "infonce" in registry.kinds() and registry.kinds() == sorted(registry.kinds())
    assert registry.config("infonce") is InfoNCEConfig
    parsed = registry.parse({"kind": "infonce", "temperature": {"init": 0.5}})
    assert isinstance(parsed, InfoNCEConfig) and parsed.temperature == Temperature(init=0.5)
    assert registry.parse(parsed) is parsed
    assert isinstance(objectives.build({"kind": "infonce"}, ["a", "b"]), InfoNCE)


@pytest.mark.parametrize(("value", "message"), [
    ({"kind": "infonse"}, r"unknown objective kind 'infonse'; did you mean 'infonce'\?.*package.module:Class"),
    ({"temperature": 1}, "settings are a mapping with a 'kind', one of .*'infonce'"),
    ("infonce", "settings are a mapping with a 'kind'"),
    ({"kind": 7}, "settings are a mapping with a 'kind'"),
    ({"kind": "infonce", "temprature": {}}, r"unknown key 'temprature'; did you mean 'temperature'\?"),
    ({"kind": "infonce", "temperature": {"init": 2.0}}, "needs 0 < min <= init <= max, got min=0.01 init=2.0 max=1.0"),
    ({"kind": "no_such_package.module:Class"}, "'no_such_package.module:Class' cannot be loaded: No module .*; looked"),
    ({"kind": "tests.test_registry:Absent"}, "cannot be loaded: .*Absent"),
    ({"kind": "tests.test_registry:NOT_A_CLASS"}, "is a int, a class is needed"),
    ({"kind": "tests.test_registry:Plian"}, "has no 'Plian'; did you mean 'Plain'"),
])  # fmt: skip
def test_a_registry_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(value)


def test_a_users_settings_class_by_path():
    parsed = registry.parse({"kind": "tests.test_registry:Mine", "margin": 0.7})
    built = objectives.build(parsed, ("a", "b"))
    assert isinstance(parsed, Mine) and isinstance(built, Plain) and (built.margin, built.views) == (0.7, ("a", "b"))
    with pytest.raises(ValueError, match=r"unknown key 'margn'; did you mean 'margin'\?"):
        registry.parse({"kind": "tests.test_registry:Mine", "margn": 0.7})


def test_a_users_own_class_by_path():
    parsed = registry.parse({"kind": "tests.test_registry:Plain", "margin": 0.7})
    assert isinstance(parsed, ExternalObjective)
    built = objectives.build(parsed, ("a", "b"))
    assert isinstance(built, Plain) and built.margin == 0.7 and built.views == ("a", "b")
    assert isinstance(build_external(ExternalObjective(kind="tests.test_registry:Plain"), views=["c"]), Plain)
    assert import_path("tests.test_registry:Plain", "objective") is Plain


def test_every_kind_of_every_registry_is_one_frozen_settings_class():
    from mvpretrain import encoders, views
    from mvpretrain.data import sources

    for some in (sources.registry, objectives.registry, encoders.registry, views.registry):
        for kind in some.kinds():
            config = some.config(kind)
            assert issubclass(config, Kind) and config.model_config.get("frozen"), config
            assert config.model_fields["kind"].annotation == Literal[kind], f"{config} must say kind: Literal[{kind!r}]"
            assert config.__doc__, f"{config} needs a docstring: it is the page that users read"


class Strict:
    """Needs a key; takes no others."""

    def __init__(self, views: Sequence[str], size: int, *, margin: float = 1.0):
        self.size = size


class Open(Strict):
    def __init__(self, size: int, **options: Any):
        super().__init__((), size)
        self.options = options


@pytest.mark.parametrize(("settings", "message"), [
    ({"size": 1, "margn": 2}, r"'tests\.test_registry:Strict': unknown key 'margn'; did you mean 'margin'\?"),
    ({}, "needs the key 'size': its constructor has no default"),
    ({"size": 1, "views": ["a"]}, "'views' is given by the package; leave the key out"),
])  # fmt: skip
def test_a_wrong_key_of_a_users_class_is_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        registry.parse({"kind": "tests.test_registry:Strict", **settings})
    parsed = registry.parse({"kind": "tests.test_registry:Open", "size": 1, "anything": 2})
    assert build_external(parsed, views=["a"]).options == {"anything": 2}  # type: ignore[arg-type]


def test_dashes_are_typed_for_underscores():
    assert registry.parse({"kind": "one-vs-rest"}) == registry.parse({"kind": "one_vs_rest"})


@pytest.mark.parametrize("where", ["beside the recipe", "in the current folder"])
def test_a_users_class_is_found(where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    place, other = tmp_path / "place", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    name = where.replace(" ", "_")
    (place / f"{name}.py").write_text("class Mine:\n    def __init__(self, scale=1): self.scale = scale\n")
    (other / f"{name}_bad.py").write_text("class Mine:\n    def __init__(self)")
    path = (place if where == "beside the recipe" else other) / "r.yaml"
    path.write_text(BASE)
    monkeypatch.chdir(other if where == "beside the recipe" else place)
    found = recipe.load(path, [f"objective={{kind: '{name}:Mine', scale: 3}}"])
    assert build_external(found.objective).scale == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be loaded: expected ':'"):
        recipe.load(path, [f"objective={{kind: '{name}_bad:Mine'}}"])
    with pytest.raises(ValueError, match=r"No module named 'nowhere'; looked in .*place"):
        recipe.load(path, ["objective={kind: 'nowhere:Mine'}"])

"""Settings refuse what they do not know, and registries find, refuse or load kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
from pydantic import ValidationError

from mvpretrain import objectives
from mvpretrain.config import Config, sentences, unknown
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ExternalObjective, ObjectiveConfig, registry
from mvpretrain.objectives.infonce import InfoNCE, InfoNCEConfig, Temperature
from mvpretrain.registry import Kind, build_external, import_path
from mvpretrain.types import Embeddings, Losses


class Inner(Config):
    width: int = 4


class Outer(Config):
    inner: Inner = Inner()
    rates: tuple[float, ...] = (0.1,)


class Plain:
    """A user's own class; it asks for the views and not for the collectives."""

    def __init__(self, views: Sequence[str], margin: float = 1.0):
        self.views, self.margin = views, margin

    def __call__(self, local: Embeddings, gathered: Embeddings) -> Losses:
        raise NotImplementedError


class Mine(ObjectiveConfig):
    """A user's settings in a user's module."""

    kind: str = "tests.test_config:Mine"
    margin: float = 0.2

    def build(self, views: Sequence[str], collectives: Collectives) -> Plain:
        return Plain(views, self.margin)


NOT_A_CLASS = 3


def test_unknown_key_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValidationError, match=r"unknown key 'rate'; did you mean 'rates'\? known: inner, rates"):
        Outer.model_validate({"rate": [0.1]})
    with pytest.raises(ValidationError, match="unknown key 'zzz'; known: width"):
        Outer.model_validate({"inner": {"zzz": 1}})


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Inner().width = 5
    assert Inner() == Inner(width=4) and hash(Inner()) == hash(Inner(width=4))


def test_sentences_say_where_and_what():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"width": "wide"}, "rates": [0.1, None], "more": 1})
    assert sentences(caught.value).startswith("recipe: unknown key 'more'")
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"width": "wide"}, "rates": [0.1, None]})
    first, second = sentences(caught.value).splitlines()
    assert first.startswith("inner.width: ") and first.endswith("got 'wide'")
    assert second.startswith("rates.1: ") and second.endswith("got None")


def test_unknown_offers_only_what_is_near():
    assert (
        unknown("view", "imege", ["image", "text"]) == "unknown view 'imege'; did you mean 'image'? known: image, text"
    )
    assert unknown("view", "q", iter(["image", "text"])) == "unknown view 'q'; known: image, text"


def test_door_lists_its_files_and_builds_them():
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
    ({"kind": "no_such_package.module:Class"}, "'no_such_package.module:Class' cannot be loaded: No module"),
    ({"kind": "tests.test_config:Absent"}, "cannot be loaded: .*Absent"),
    ({"kind": "tests.test_config:NOT_A_CLASS"}, "is a int, a class is needed"),
])  # fmt: skip
def test_door_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(value)


def test_a_users_settings_class_by_path():
    parsed = registry.parse({"kind": "tests.test_config:Mine", "margin": 0.7})
    built = objectives.build(parsed, ("a", "b"))
    assert isinstance(parsed, Mine) and isinstance(built, Plain) and (built.margin, built.views) == (0.7, ("a", "b"))
    with pytest.raises(ValueError, match=r"unknown key 'margn'; did you mean 'margin'\?"):
        registry.parse({"kind": "tests.test_config:Mine", "margn": 0.7})


def test_a_users_own_class_by_path():
    parsed = registry.parse({"kind": "tests.test_config:Plain", "margin": 0.7})
    assert isinstance(parsed, ExternalObjective)
    built = objectives.build(parsed, ("a", "b"))
    assert isinstance(built, Plain) and built.margin == 0.7 and built.views == ("a", "b")
    assert isinstance(build_external(ExternalObjective(kind="tests.test_config:Plain"), views=["c"]), Plain)
    assert import_path("tests.test_config:Plain", "objective") is Plain


def test_every_kind_of_every_door_is_one_frozen_settings_class():
    from mvpretrain import encoders, views

    for some in (objectives.registry, encoders.registry, views.registry):
        for kind in some.kinds():
            config = some.config(kind)
            assert issubclass(config, Kind) and config.model_config.get("frozen"), config
            assert config.model_fields["kind"].annotation == Literal[kind], f"{config} must say kind: Literal[{kind!r}]"
            assert config.__doc__, f"{config} needs a docstring: it is the page that users read"

"""Settings are frozen and refuse what they do not know."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mvpretrain.config import Config, check_name, sentences, unknown


class Inner(Config):
    width: int = 4


class Outer(Config):
    inner: Inner = Inner()
    rates: tuple[float, ...] = (0.1,)


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


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "/a", "a/b", "a\\b", "a\nb", None, 7])
def test_names_that_would_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match=r"view .* is no name: give it one without slashes"):
        check_name("view", name)
    check_name("view", "lead II (aVF).x")

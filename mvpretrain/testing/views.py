"""The laws of views: what holds for every kind of transform from a raw field to an item."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvpretrain import views
from mvpretrain.testing._laws import described, law, require, require_close, require_finite, settings_of
from mvpretrain.types import Transform, View
from mvpretrain.views import ViewConfig

LATENTS = np.random.default_rng(0).standard_normal((3, 6))  # what sketches show
# A file cut short, one of another format, and fields of another kind.
BAD_FIELDS: tuple[Any, ...] = (
    b"",
    b"\x00\x01 no format that there is",
    None,
    3.5,
    {},
    [],
    np.zeros((0, 2), np.float32),
)


def check_view(view: str | type | Mapping[str, Any] | ViewConfig) -> None:
    """Hold a view to the laws of views.

    `view`: settings with a `kind` and a `field`, or a kind, import path or class, whose examples() are then all
    checked. Raw fields are drawn by its sketch(latent). AssertionError: a sentence with the law, the settings and the
    numbers. ValueError: nothing to check. Cost: a few dozen items.
    """
    for config in settings_of(views.registry, view):
        config.sketch(LATENTS[0])  # a ValueError where there is none
        for name, check in LAWS:
            with law(name, described(config)):
                check(config)


def require_item(item: View, blank: View, what: str) -> None:
    """An item of the shape and type of the blank one, all finite."""
    found, wanted = (f"{tuple(x.data.shape)} {x.data.dtype}" for x in (item, blank))
    require(found == wanted, f"{what} is {found}, and blank() is {wanted}: every item has one shape and type")
    require((item.mask is None) == (blank.mask is None), f"{what} and blank() are not both with a mask or without")
    require_finite(item.data, what)
    if item.mask is not None:
        shape, length = tuple(item.mask.shape), tuple(item.data.shape[:1])
        require(item.mask.dtype == torch.bool and shape == length, f"the mask of {what} is {shape}, not bool {length}")
        require(bool(item.mask.any()), f"the mask of {what} is False everywhere: encoders need one position")


def require_same(one: View, other: View, what: str) -> None:
    require_close(one.data, other.data, 0, 0, what)
    if one.mask is not None and other.mask is not None:
        require_close(one.mask, other.mask, 0, 0, f"the mask of {what}")


def check_shapes(config: ViewConfig) -> None:
    """Items of training and evaluation have one shape, that of blank(), and are finite."""
    blanks = []
    for train in (True, False):
        transform = config.build(train=train)
        require(isinstance(transform, Transform), "what it builds has no blank() or is not callable")
        blanks.append(transform.blank())
        require_item(blanks[-1], blanks[0], f"blank() with train={train}")
        for latent in LATENTS:
            require_item(transform(config.sketch(latent)), blanks[0], f"an item with train={train}")
    require_same(blanks[1], blanks[0], "blank() in evaluation, against training,")


def check_chance(config: ViewConfig) -> None:
    """Training draws from torch's global generator alone; evaluation draws nothing."""
    for train in (True, False):
        transform = config.build(train=train)
        torch.manual_seed(5)
        before, first = torch.get_rng_state(), transform(config.sketch(LATENTS[0]))
        after = torch.get_rng_state()
        torch.manual_seed(5)
        what = "an item of the same field and seed, made again" if train else "an item of evaluation, made again"
        require_same(transform(config.sketch(LATENTS[0])), first, what)
        require(train or torch.equal(before, after), "evaluation draws from torch's generator")


def check_fields(config: ViewConfig) -> None:
    """The raw field is left as it was, and sketches of one latent are one field."""
    for train in (True, False):
        raw, transform = config.sketch(LATENTS[0]), config.build(train=train)
        before = pickle.dumps(raw)
        require(pickle.dumps(config.sketch(LATENTS[0].copy())) == before, "two sketches of one latent differ")
        transform(raw)
        require(pickle.dumps(raw) == before, f"the raw field is changed by the transform with train={train}")


def check_pickling(config: ViewConfig) -> None:
    """Settings and transforms survive the way to a worker process, and settings that to a recipe and back."""
    require(pickle.loads(pickle.dumps(config)) == config, "its settings are others after pickle")
    again = views.registry.parse(config.model_dump(mode="json"))
    require(again == config, f"its settings are others after they were written: {described(again)}")
    with tempfile.TemporaryDirectory() as folder:
        portable = config.portable(Path(folder))
        parsed = views.registry.parse(portable.model_dump(mode="json"))
        require(parsed == portable, "its portable settings are others after they were written")
    for train in (True, False):
        transform, items = config.build(train=train), []
        for made in (transform, pickle.loads(pickle.dumps(transform))):
            torch.manual_seed(5)
            items.append(made(config.sketch(LATENTS[0])))
        require_same(items[1], items[0], "an item of the transform after pickle")


def check_bad_fields(config: ViewConfig) -> None:
    """A field that cannot be read is a ValueError, which data loading counts, or an item like any other."""
    transform = config.build(train=False)
    for bad in BAD_FIELDS:
        try:
            item = transform(bad)
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"{bad!r} raises {type(error).__name__}, not ValueError: {error}") from error
        require_item(item, transform.blank(), f"the item of {bad!r}")


LAWS: tuple[tuple[str, Callable[[ViewConfig], None]], ...] = (
    ("shapes", check_shapes),
    ("chance", check_chance),
    ("fields", check_fields),
    ("pickling", check_pickling),
    ("bad fields", check_bad_fields),
)

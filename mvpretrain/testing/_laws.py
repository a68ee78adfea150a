"""What the checks of objectives, encoders and views share: whose settings are checked, and how a broken law reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mvpretrain.registry import Kind, Registry, import_path


def settings_of(registry: Registry[Any], asked: str | type | Mapping[str, Any] | Kind) -> list[Any]:
    """The settings to check: those given, or all examples of a kind, an import path or a class.

    ValueError: no such kind, wrong settings, or a kind that gives no examples.
    """
    if not isinstance(asked, str | type):
        return [registry.parse(asked if isinstance(asked, Kind) else dict(asked))]
    kind = asked if isinstance(asked, str) else f"{asked.__module__}:{asked.__qualname__}"
    owner: type = registry.config(kind)
    if owner is registry.external:
        owner = import_path(kind, registry.noun)
    given = getattr(owner, "examples", None)
    examples = given() if given else []
    if not examples:
        raise ValueError(
            f"{registry.noun} kind {kind!r} has no examples to check: give {owner.__name__} a classmethod "
            "examples(cls) -> list[dict], its smallest complete settings and its variants, or give settings here"
        )
    return [x if isinstance(x, Kind) else registry.parse({"kind": kind, **x}) for x in examples]


def described(config: Kind) -> str:
    """The kind and the settings that are said, for a sentence."""
    said = config.model_dump(mode="json", exclude_unset=True)
    said.pop("kind", None)
    return f"{config.kind} {said}" if said else config.kind


@contextmanager
def law(name: str, subject: str) -> Iterator[None]:
    """Whatever goes wrong inside is an AssertionError that names the law and what it was checked on.

    Only a library that is not installed is no broken law: ModuleNotFoundError stays.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except AssertionError as error:
        raise AssertionError(f"{subject} breaks the law of {name}: {error}") from error.__cause__
    except Exception as error:
        raise AssertionError(f"{subject} breaks the law of {name}: {type(error).__name__}: {error}") from error


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def require_close(found: Tensor, wanted: Tensor, rtol: float, atol: float, what: str) -> None:
    """Equal shapes, and everywhere |found - wanted| <= atol + rtol |wanted|; NaN equals NaN."""
    require(found.shape == wanted.shape, f"{what} has the shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    found, wanted = found.detach().double(), wanted.detach().double()
    close = torch.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return
    excess = (found - wanted).abs() - rtol * wanted.abs()
    at = int(excess.nan_to_num(nan=torch.inf).masked_fill(close, -torch.inf).argmax())
    one, other = (float(x.flatten()[at]) for x in (found, wanted))
    raise AssertionError(f"{what} is {one:.9g} instead of {other:.9g}, and may be off by {rtol:g} of it and {atol:g}")


def require_finite(x: Tensor | None, what: str) -> None:
    require(x is not None and bool(x.isfinite().all()), f"{what} is not finite")

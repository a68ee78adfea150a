"""Frozen settings, and the doors: folders in which every file is one `kind`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """A frozen group of settings; a key it does not know is refused with the nearest one it does."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and cls.model_config.get("extra") == "forbid":
            known = [f.alias or name for name, f in cls.model_fields.items()]
            for key in value:
                if key not in known:
                    raise ValueError(unknown("key", str(key), known))
        return value


class Kind(Config):
    """Settings that name the class they build by `kind`."""

    kind: str


class Foreign(Kind):
    """`kind: some_package.module:Class`: the other keys go to the class as keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)


K = TypeVar("K", bound=Kind)


class Door(Generic[K]):
    """A folder of kinds: the file `infonce.py` holds the one subclass of `base` that is `kind: infonce`.

    Files are imported when their kind is asked for, so that a recipe pays only for the libraries that it names.
    """

    def __init__(self, package: str, base: type[K], foreign: type[K], noun: str):
        self.package, self.base, self.foreign, self.noun = package, base, foreign, noun

    def kinds(self) -> list[str]:
        folder = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(folder))

    def config(self, kind: str) -> type[K]:
        """The settings class of one kind. ValueError: no such kind, or a path that does not lead to a class."""
        if ":" in kind:
            found = import_path(kind, self.noun)
            return found if issubclass(found, self.base) else self.foreign
        if kind not in self.kinds():
            raise ValueError(unknown(f"{self.noun} kind", kind, self.kinds()) + " or write package.module:Class")
        module = importlib.import_module(f"{self.package}.{kind}")
        here = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, self.base) and c.__module__ == module.__name__
        ]
        assert len(here) == 1, f"{module.__name__} must define one {self.base.__name__}, found {here}"
        return here[0]

    def parse(self, value: Any) -> K:
        """Settings from a mapping with a `kind`; settings pass through."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"{self.noun} settings are a mapping with a 'kind', one of {self.kinds()}, got {value!r}")
        return self.config(value["kind"]).model_validate(value)


def import_path(path: str, noun: str) -> type:
    """The class at `package.module:Class`. ValueError with the reason where there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{noun} kind {path!r} cannot be loaded: {error}") from error
    if not inspect.isclass(found):
        raise ValueError(f"{noun} kind {path!r} is a {type(found).__name__}, a class is needed")
    return found


def call_foreign(config: Foreign, **context: Any) -> Any:
    """Build a user's own class from its extra keys, with those parts of the context that its constructor names."""
    found: Callable[..., Any] = import_path(config.kind, "user")
    asked = inspect.signature(found).parameters
    return found(**{k: v for k, v in context.items() if k in asked}, **(config.model_extra or {}))


def unknown(noun: str, value: str, known: Iterable[str]) -> str:
    """One clause that refuses a name and offers the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {noun} {value!r}; {hint}known: {', '.join(known)}"


def sentences(error: ValidationError) -> str:
    """A validation error as one line a problem: `where: what`."""
    lines = []
    for e in error.errors():
        where = ".".join(str(p) for p in e["loc"]) or "recipe"
        what = e["msg"].removeprefix("Value error, ")
        given = "" if e["type"] in ("value_error", "missing") else f", got {e['input']!r}"
        lines.append(f"{where}: {what}{given}")
    return "\n".join(lines)

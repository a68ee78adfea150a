"""Frozen settings, and sentences for those that are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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


def check_name(noun: str, name: Any) -> None:
    """ValueError unless `name` can be the name of a file or folder, which it becomes, in whatever folder it is put."""
    good = isinstance(name, str) and name and name.isprintable() and not name.startswith(".")
    if not good or "/" in name or "\\" in name:
        raise ValueError(f"{noun} {name!r} is no name: give it one without slashes and dots in front")


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


@contextmanager
def errors_at(key: str) -> Iterator[None]:
    """A ValueError within the block begins with the key of the recipe that it is about: `towers.a.encoder: ...`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error

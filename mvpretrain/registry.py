"""Registries: folders in which every file is one `kind`, classes of a user by import path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mvpretrain.config import Config, unknown


class Kind(Config):
    """Settings that name the class they build by `kind`."""

    kind: str


class External(Kind):
    """`kind: some_package.module:Class`: the other keys go to the class as keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)


K = TypeVar("K", bound=Kind)


class Registry(Generic[K]):
    """A folder of kinds: the file `infonce.py` holds the one subclass of `base` that is `kind: infonce`.

    Files are imported when their kind is asked for, so that a recipe pays only for the libraries that it names. A
    field of settings that is `Annotated[SerializeAsAny[Base], registry]` takes the settings of any kind.
    """

    def __init__(self, package: str, base: type[K], external: type[K], noun: str):
        self.package, self.base, self.external, self.noun = package, base, external, noun

    def kinds(self) -> list[str]:
        folder = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))

    def config(self, kind: str) -> type[K]:
        """The settings class of one kind. ValueError: no such kind, or a path that does not lead to a class."""
        if ":" in kind:
            if _as_written.get():
                return self.external
            found = import_path(kind, self.noun)
            return found if issubclass(found, self.base) else self.external
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

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """pydantic's hook for annotated fields. The metadata tell a recipe's JSON schema which kinds there are."""
        inner = handler(source)
        return core_schema.no_info_before_validator_function(self.parse, inner, metadata={"registry": self})


_as_written: ContextVar[bool] = ContextVar("as_written", default=False)


@contextmanager
def externals_as_written() -> Iterator[None]:
    """Within the block nothing of a user's is imported: settings of an external class are read as they are written."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


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


def build_external(config: External, **context: Any) -> Any:
    """Build a user's own class from its extra keys, with those parts of the context that its constructor names."""
    found: Callable[..., Any] = import_path(config.kind, "user")
    asked = inspect.signature(found).parameters
    return found(**{k: v for k, v in context.items() if k in asked}, **(config.model_extra or {}))

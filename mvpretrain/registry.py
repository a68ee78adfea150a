"""Registries, which are folders in which every file is one `kind`; a user's own classes by import path; and trust.

Some settings run code: those that name a class outside of this package, a shell command in place of a url, or options
of a library that imports what they name. A value that code passes is trusted. A recipe or export that is read from a
folder is not, unless the user says so: within `trusting(False)` such settings are refused in a sentence.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mvpretrain.config import Config, unknown

_trust: ContextVar[Literal["full", "none", "as written"]] = ContextVar("trust", default="full")


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Within the block, settings that run code from outside of this package are refused unless `trust`.

    Within `externals_as_written`, where none is run, and within an outer block, nothing changes.
    """
    token = _trust.set("none" if not trust and _trust.get() == "full" else _trust.get())
    try:
        yield
    finally:
        _trust.reset(token)


@contextmanager
def externals_as_written() -> Iterator[None]:
    """Within the block nothing of a user's is imported: settings of an external class are taken as they are written."""
    token = _trust.set("as written")
    try:
        yield
    finally:
        _trust.reset(token)


def refuse_untrusted(what: str) -> None:
    """ValueError, with the remedy, where settings that are not trusted ask for `what`."""
    if _trust.get() == "none":
        raise ValueError(
            f"{what} runs code from outside of this package, and what is read from a folder may come from anyone; "
            "if you trust it, add --trust (in Python trust=True)"
        )


class Kind(Config):
    """Settings that name the class they build by `kind`."""

    kind: str


class External(Kind):
    """`kind: some_package.module:Class`: the other keys go to the class as keyword arguments.

    `context` are the arguments that `build` adds for a constructor that names them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)
    context: ClassVar[tuple[str, ...]] = ()

    def method(self, name: str) -> Callable[..., Any] | None:
        """A static or class method by which the class says of itself what settings say of a kind; None without it."""
        return getattr(import_path(self.kind, "user"), name, None)


K = TypeVar("K", bound=Kind)


class Registry(Generic[K]):
    """A folder of kinds: the file `infonce.py` holds the one subclass of `base` that is `kind: infonce`.

    Files are imported when their kind is asked for, so that a recipe pays only for the libraries that it names. A
    field of settings that is `Annotated[SerializeAsAny[Base], registry]` takes the settings of any kind.
    """

    def __init__(self, package: str, base: type[K], external: type[K], noun: str):
        self.package, self.base, self.external, self.noun = package, base, external, noun

    def kinds(self) -> list[str]:
        """The names of the folder's kinds."""
        folder = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))

    def config(self, kind: str) -> type[K]:
        """The settings class of one kind. ValueError: no such kind, or a path that does not lead to a class."""
        if ":" in kind:
            found = import_path(kind, self.noun)
            return found if issubclass(found, self.base) else self.external
        name = kind.replace("-", "_")
        if name not in self.kinds():
            raise ValueError(unknown(f"{self.noun} kind", kind, self.kinds()) + " or write package.module:Class")
        module = importlib.import_module(f"{self.package}.{name}")
        here = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, self.base) and c.__module__ == module.__name__
        ]
        assert len(here) == 1, f"{module.__name__} must define one {self.base.__name__}, found {here}"
        return here[0]

    def parse(self, value: Any) -> K:
        """Settings from a mapping with a `kind`; settings pass through.

        ValueError: an unknown kind or key, a bad value, or an external class that is not trusted.
        """
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"{self.noun} settings are a mapping with a 'kind', one of {self.kinds()}, got {value!r}")
        kind = value["kind"]
        if ":" in kind and _trust.get() == "as written":
            return self.external.model_construct(**{str(key): given for key, given in value.items()})
        config = self.config(kind)
        if ":" not in kind:
            return config.model_validate({**value, "kind": kind.replace("-", "_")})
        parsed = config.model_validate(value)
        if config is self.external:
            assert isinstance(parsed, External)
            check_arguments(parsed, self.noun)
        return parsed

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """pydantic's hook for annotated fields. The metadata tell a recipe's JSON schema which kinds there are."""
        inner = handler(source)
        return core_schema.no_info_before_validator_function(self.parse, inner, metadata={"registry": self})


def import_path(path: str, noun: str) -> type:
    """The class at `package.module:Class`.

    ValueError: it is not trusted, cannot be imported (with the folders that were looked in), or is no class.
    """
    refuse_untrusted(f"{noun} kind {path!r}")
    assert _trust.get() != "as written", f"{path!r} would be imported where settings are only shown"
    name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{noun} kind {path!r} cannot be loaded: {error}; looked in {_searched()}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        where = getattr(module, "__file__", None) or f"a folder without __init__.py: {_searched()}"
        raise ValueError(f"{noun} kind {path!r} cannot be loaded: {name} has no {attribute!r}; {hint}it is {where}")
    found = getattr(module, attribute)
    if not inspect.isclass(found):
        raise ValueError(f"{noun} kind {path!r} is a {type(found).__name__}, a class is needed")
    return found


def search_in(folder: Path) -> None:
    """Let external classes be found in `folder` and in the current one, after all that is installed.

    They stay on the path, for classes that are imported later and for worker processes.
    """
    for directory in (folder, Path.cwd()):
        if str(directory.absolute()) not in sys.path:
            sys.path.append(str(directory.absolute()))


def _searched() -> str:
    """The folders of the path in words, those of the interpreter summed up."""
    inside = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix})
    outside = [os.path.abspath(p) for p in sys.path if not os.path.abspath(p).startswith(inside)]
    return ", ".join([repr(p) for p in dict.fromkeys(outside)] + ["the installed packages"])


def check_arguments(config: External, noun: str) -> None:
    """ValueError where the keys of an external class are not what its constructor takes."""
    found = import_path(config.kind, noun)
    asked = _parameters(found)
    extra = config.model_extra or {}
    if asked is None:
        return
    known = [name for name, p in asked.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    offered = [*type(config).model_fields, *(name for name in known if name not in config.context)]
    for key in extra:
        if key in config.context:
            raise ValueError(f"{noun} kind {config.kind!r}: {key!r} is given by the package; leave the key out")
        if key not in known and not any(p.kind is p.VAR_KEYWORD for p in asked.values()):
            raise ValueError(f"{noun} kind {config.kind!r}: {unknown('key', key, offered)}")
    for name, p in asked.items():
        if name in known and p.default is p.empty and name not in (*extra, *config.context):
            raise ValueError(f"{noun} kind {config.kind!r} needs the key {name!r}: its constructor has no default")


def build_external(config: External, **context: Any) -> Any:
    """Build a user's own class from its extra keys, with those parts of the context that its constructor names."""
    assert set(context) <= set(config.context), (context, config.context)
    found: Callable[..., Any] = import_path(config.kind, "user")
    asked = _parameters(found) or {}
    return found(**{k: v for k, v in context.items() if k in asked}, **(config.model_extra or {}))


def _parameters(found: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The constructor's parameters; None where Python cannot tell, as for some classes written in C."""
    try:
        return inspect.signature(found).parameters
    except ValueError:
        return None

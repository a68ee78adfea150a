"""The house is held up by floors: imports point strictly downwards, and some libraries live in one room only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = (
    "types config files",
    "registry",
    "shards transport distributed",
    "views encoders similarity",
    "data",
    "model objectives loggers",
    "engine evaluation",
    "recipe",
    "training",
    "testing export profiling",
    "report",
    "finetune",
    "cli",
    "__main__",
)
FLOORS = {name: floor for floor, names in enumerate(HOUSE) for name in names.split()}
# Their files are kinds, which know their room's front and its files with a leading underscore, and not one another.
REGISTRIES = ("views", "encoders", "objectives", "data.sources", "loggers", "evaluation", "export.formats")
ROOMS = {
    "torch.distributed": ("mvpretrain.distributed", "mvpretrain.engine"),
    "accelerate": ("mvpretrain.engine",),
    "deepspeed": ("mvpretrain.engine",),
    "webdataset": ("mvpretrain.shards",),
}
BAD_NAMES = {"utils", "util", "common", "base", "factory", "legacy", "helpers", "misc"}
LONGEST_FILE, LONGEST_FUNCTION, AIM = 340, 60, 35


def module_name(path: str) -> str:
    """`mvpretrain/views/__init__.py` is mvpretrain.views."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree: ast.AST, path: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also those inside functions; `from a import b` is a.b where that is a module."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole in known or whole in ROOMS else source
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ROOMS:
            yield node.lineno, ast.unparse(node)


def crossing(importer: str, target: str) -> str | None:
    """Why one module of the package may not import another; None where it may."""
    here, there = importer.split(".")[1:], target.split(".")[1:]
    if not here or here[0] not in FLOORS:
        return None  # the package's front lists names of every floor; a file without one is reported already
    if not there:
        return "imports the package's front, which is above it"
    if there[0] not in FLOORS:
        return "has no floor"
    if here[0] == there[0]:
        return between_kinds(".".join(here), ".".join(there))
    if FLOORS[there[0]] < FLOORS[here[0]]:
        return None
    return f"floor {FLOORS[here[0]]} imports from floor {FLOORS[there[0]]}; imports point strictly downwards"


def between_kinds(here: str, there: str) -> str | None:
    """Why one file of a room may not import another file of it; circles are looked for by themselves."""
    for room in REGISTRIES:
        if there.startswith(f"{room}.") and not there.removeprefix(f"{room}.").startswith("_"):
            if here == room:
                return "a registry's front does not import its kinds"
            if here.startswith(f"{room}."):
                return "kinds of one folder do not import one another; what they share starts with an underscore"
    return None


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """One sentence for each circle that a walk along the imports runs into."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield " imports ".join([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                yield from walk(target, [*path, name])
            done.add(name)

    for name in sorted(arrows):
        yield from walk(name, [])


def misplaced(path: str, name: str) -> Iterator[str]:
    parts = name.split(".")
    if len(parts) > 1 and parts[1] not in FLOORS:
        yield f"{path}: give {parts[1]!r} a floor in FLOORS of tests/test_floors.py"
    for part in parts:
        if part in BAD_NAMES:
            yield f"{path}: {part!r} says nothing about what is inside"


def oversized(path: str, source: str, tree: ast.AST) -> Iterator[str]:
    lines = source.count("\n")
    if lines > LONGEST_FILE:
        yield f"{path}: {lines} lines, the most is {LONGEST_FILE}"
    for name, length in functions(tree):
        if length > LONGEST_FUNCTION:
            yield f"{path}: {name} has {length} lines, the most is {LONGEST_FUNCTION}"


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def misrouted(path: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    name = module_name(path)
    for line, target in imported(tree, path, known):
        why = crossing(name, target) if target.split(".")[0] == "mvpretrain" else None
        if why:
            yield f"{path}:{line}: {target}: {why}"
        for library, rooms in ROOMS.items():
            if inside(target, library) and not any(inside(name, room) for room in rooms):
                yield f"{path}:{line}: {library} lives in {' and '.join(rooms)} only"


def shapeless(path: str, tree: ast.AST) -> Iterator[str]:
    """Shapes whose quotes are gone: an automatic fix (ruff UP037) makes products of "b *d", which check nothing."""
    kinds = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in kinds:
            shape = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
            if not isinstance(shape, ast.Constant) or not isinstance(shape.value, str):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}: a shape is a string"


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(source_by_path: dict[str, str]) -> list[str]:
    """What is wrong with a tree of sources, one sentence each; paths begin with `mvpretrain/`."""
    known = {module_name(p) for p in source_by_path}
    found: list[str] = []
    arrows: dict[str, set[str]] = {}
    for path, source in sorted(source_by_path.items()):
        tree = ast.parse(source)
        found += misplaced(path, module_name(path))
        found += oversized(path, source, tree)
        found += [f"{path}: {word} left" for word in ("TODO", "FIXME") if word in source]
        found += misrouted(path, tree, known)
        found += shapeless(path, tree)
        arrows[module_name(path)] = {t for _, t in imported(tree, path, known) if t in known} - {module_name(path)}
    arrows.pop("mvpretrain", None)
    found += circles(arrows)
    return list(dict.fromkeys(found))


def sources() -> dict[str, str]:
    files = sorted((ROOT / "mvpretrain").rglob("*.py"))
    return {f.relative_to(ROOT).as_posix(): f.read_text() for f in files}


def test_the_house_stands():
    assert len(sources()) > 10
    wrong = violations(sources())
    assert not wrong, "\n".join(wrong)


def test_tests_stand_in_folders_of_the_rooms():
    folders = {f.parent.relative_to(ROOT / "tests") for f in (ROOT / "tests").rglob("test_*.py")}
    lost = [str(f) for f in folders if not (ROOT / "mvpretrain" / f).is_dir() and not (ROOT / f).is_dir()]
    assert len(folders) > 15 and not lost, lost


def test_most_functions_are_short():
    lengths = [(n, f"{path}: {name}") for path, s in sources().items() for name, n in functions(ast.parse(s))]
    share = sum(n <= AIM for n, _ in lengths) / len(lengths)
    print(f"{share:.1%} of {len(lengths)} functions have at most {AIM} lines; longest: {sorted(lengths)[-3:]}")
    assert share > 0.9


@pytest.mark.parametrize(("path", "source", "message"), [
    ("mvpretrain/types.py", "from mvpretrain.config import Config", "floor 0 imports from floor 0"),
    ("mvpretrain/transport/a.py", "from mvpretrain.distributed import pool", "floor 2 imports from floor 2"),
    ("mvpretrain/similarity/a.py", "def f():\n    import mvpretrain.model.task", "floor 3 imports from floor 5"),
    ("mvpretrain/objectives/a.py", "from mvpretrain.objectives.b import B", "kinds of one folder"),
    ("mvpretrain/objectives/a.py", "from mvpretrain.objectives import b", "kinds of one folder"),
    ("mvpretrain/objectives/a.py", "from . import b", "kinds of one folder"),
    ("mvpretrain/objectives/a.py", "from ..model.task import Task", "floor 5 imports from floor 5"),
    ("mvpretrain/objectives/__init__.py", "from mvpretrain.objectives.b import B", "a registry's front"),
    ("mvpretrain/objectives/a.py", "from mvpretrain import load_recipe", "the package's front"),
    ("mvpretrain/encoders/_layers.py", "from mvpretrain.encoders.vit import ViT", "kinds of one folder"),
    ("mvpretrain/model/task.py", "import torch.distributed as dist", "torch.distributed lives in"),
    ("mvpretrain/model/task.py", "from torch import distributed", "torch.distributed lives in"),
    ("mvpretrain/model/task.py", "from torch.distributed.nn import functional", "torch.distributed lives in"),
    ("mvpretrain/model/task.py", "import torch\ntorch.distributed.barrier()", "torch.distributed lives in"),
    ("mvpretrain/cli/a.py", "def f():\n    import deepspeed.comm", "deepspeed lives in mvpretrain.engine only"),
    ("mvpretrain/cli/a.py", "from accelerate import Accelerator", "accelerate lives in mvpretrain.engine only"),
    ("mvpretrain/views/a.py", "import webdataset as wds", "webdataset lives in mvpretrain.shards only"),
    ("mvpretrain/attic.py", "", "give 'attic' a floor"),
    ("mvpretrain/views/utils.py", "", "'utils' says nothing"),
    ("mvpretrain/views/a.py", "x = 1\n" * 341, "341 lines, the most is 340"),
    ("mvpretrain/views/a.py", "def f():\n" + "    pass\n" * 60, "f has 61 lines, the most is 60"),
    ("mvpretrain/views/a.py", "from jaxtyping import Float\nx: Float[Tensor, b * d]", "a shape is a string"),
    ("mvpretrain/views/a.py", "# TODO: later", "TODO left"),
])  # fmt: skip
def test_cracks_are_seen(path, source, message):
    found = violations({"mvpretrain/objectives/b.py": "", path: source})
    assert len(found) == 1 and message in found[0], found


def test_circles_are_seen():
    one, two = "from mvpretrain.engine.b import x", "def f():\n    from mvpretrain.engine import a"
    found = violations({"mvpretrain/engine/a.py": one, "mvpretrain/engine/b.py": two})
    assert found == ["mvpretrain.engine.a imports mvpretrain.engine.b imports mvpretrain.engine.a"]


def test_sound_sources_pass():
    assert not violations({
        "mvpretrain/__init__.py": "from mvpretrain.recipe import load_recipe",
        "mvpretrain/objectives/a.py": "from mvpretrain.objectives import Kind\nfrom mvpretrain.similarity import a",
        "mvpretrain/encoders/conv.py": "from mvpretrain.encoders import _layers",
        "mvpretrain/shards/stream.py": "import webdataset\nfrom mvpretrain.shards.index import Index",
        "mvpretrain/engine/a.py": "import deepspeed\nfrom torch import distributed\nfrom mvpretrain.model import a",
        "mvpretrain/recipe.py": "",
    })  # fmt: skip

"""The house is held up by floors: imports point strictly downwards, and some libraries live in one room only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = (
    "types config",
    "numerics exchange stopwatch shards views encoders blocks",
    "similarity directed sharded teacher",
    "moving",
    "objectives tower",
    "task",
    "optim",
    "recipe",
    "engine feed logbook",
    "checkpoint evaluation exported measure",
    "loop exporting embed planner",
    "report preview bench",
    "cli",
    "__main__",
)
FLOORS = {name: floor for floor, names in enumerate(HOUSE) for name in names.split()}
SIDEWAYS = {("encoders", "blocks")}
# The other folders' files know their door at most, and not one another.
OPEN_INSIDE = {"numerics", "shards", "evaluation", "engine"}
ROOMS = {
    "torch.distributed": ("mvpretrain.exchange", "mvpretrain.engine"),
    "accelerate": ("mvpretrain.engine",),
    "deepspeed": ("mvpretrain.engine",),
    "webdataset": ("mvpretrain.shards",),
}
BAD_NAMES = {"utils", "util", "common", "base", "factory", "legacy", "helpers", "misc"}
LONGEST_FILE, LONGEST_FUNCTION, AIM = 300, 60, 35


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
        allowed = here[0] in OPEN_INSIDE or len(there) == 1 < len(here)
        return None if allowed else "files of one folder do not import one another, nor does the door import its kinds"
    if (here[0], there[0]) in SIDEWAYS or FLOORS[there[0]] < FLOORS[here[0]]:
        return None
    return f"floor {FLOORS[here[0]]} imports from floor {FLOORS[there[0]]}; imports point strictly downwards"


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
    for path, source in sorted(source_by_path.items()):
        tree = ast.parse(source)
        found += misplaced(path, module_name(path))
        found += oversized(path, source, tree)
        found += [f"{path}: {word} left" for word in ("TODO", "FIXME") if word in source]
        found += misrouted(path, tree, known)
        found += shapeless(path, tree)
    return list(dict.fromkeys(found))


def sources() -> dict[str, str]:
    files = sorted((ROOT / "mvpretrain").rglob("*.py"))
    return {f.relative_to(ROOT).as_posix(): f.read_text() for f in files}


def test_the_house_stands():
    assert len(sources()) > 10
    wrong = violations(sources())
    assert not wrong, "\n".join(wrong)


def test_most_functions_are_short():
    lengths = [(n, f"{path}: {name}") for path, s in sources().items() for name, n in functions(ast.parse(s))]
    share = sum(n <= AIM for n, _ in lengths) / len(lengths)
    print(f"{share:.1%} of {len(lengths)} functions have at most {AIM} lines; longest: {sorted(lengths)[-3:]}")
    assert share > 0.9


@pytest.mark.parametrize(("path", "source", "message"), [
    ("mvpretrain/types.py", "from mvpretrain.config import Config", "floor 0 imports from floor 0"),
    ("mvpretrain/numerics/a.py", "from mvpretrain.exchange import Alone", "floor 1 imports from floor 1"),
    ("mvpretrain/numerics/a.py", "def f():\n    import mvpretrain.task", "floor 1 imports from floor 5"),
    ("mvpretrain/objectives/a.py", "from mvpretrain.objectives.b import B", "files of one folder"),
    ("mvpretrain/objectives/a.py", "from mvpretrain.objectives import b", "files of one folder"),
    ("mvpretrain/objectives/a.py", "from . import b", "files of one folder"),
    ("mvpretrain/objectives/a.py", "from ..task import Task", "floor 4 imports from floor 5"),
    ("mvpretrain/objectives/__init__.py", "from mvpretrain.objectives.b import B", "nor does the door"),
    ("mvpretrain/objectives/a.py", "from mvpretrain import load_recipe", "the package's front"),
    ("mvpretrain/blocks.py", "from mvpretrain.encoders import door", "floor 1 imports from floor 1"),
    ("mvpretrain/task.py", "import torch.distributed as dist", "torch.distributed lives in"),
    ("mvpretrain/task.py", "from torch import distributed", "torch.distributed lives in"),
    ("mvpretrain/task.py", "from torch.distributed.nn import functional", "torch.distributed lives in"),
    ("mvpretrain/task.py", "import torch\ntorch.distributed.barrier()", "torch.distributed lives in"),
    ("mvpretrain/cli.py", "def f():\n    import deepspeed.comm", "deepspeed lives in mvpretrain.engine only"),
    ("mvpretrain/cli.py", "from accelerate import Accelerator", "accelerate lives in mvpretrain.engine only"),
    ("mvpretrain/views/a.py", "import webdataset as wds", "webdataset lives in mvpretrain.shards only"),
    ("mvpretrain/attic.py", "", "give 'attic' a floor"),
    ("mvpretrain/views/utils.py", "", "'utils' says nothing"),
    ("mvpretrain/views/a.py", "x = 1\n" * 301, "301 lines, the most is 300"),
    ("mvpretrain/views/a.py", "def f():\n" + "    pass\n" * 60, "f has 61 lines, the most is 60"),
    ("mvpretrain/views/a.py", "from jaxtyping import Float\nx: Float[Tensor, b * d]", "a shape is a string"),
    ("mvpretrain/views/a.py", "# TODO: later", "TODO left"),
])  # fmt: skip
def test_cracks_are_seen(path, source, message):
    found = violations({"mvpretrain/objectives/b.py": "", path: source})
    assert len(found) == 1 and message in found[0], found


def test_sound_sources_pass():
    assert not violations({
        "mvpretrain/__init__.py": "from mvpretrain.recipe import load_recipe",
        "mvpretrain/objectives/a.py": "from mvpretrain.objectives import Kind\nfrom mvpretrain.numerics import tiles",
        "mvpretrain/encoders/conv.py": "from mvpretrain.blocks import norm",
        "mvpretrain/shards/stream.py": "import webdataset\nfrom mvpretrain.shards.index import Index",
        "mvpretrain/engine.py": "import deepspeed\nfrom torch import distributed\nfrom mvpretrain.task import Task",
        "mvpretrain/recipe.py": "",
    })  # fmt: skip

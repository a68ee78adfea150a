"""One concept has one name: words that the house gave up are not left as names of what it defines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A word of a name -> what to say for the concept that it stood for.
EVERYWHERE = {
    "door": "registry",
    "foreign": "external class",
    "exchange": "collectives",
    "swap": "send_recv",
    "keyed": "id table",
    "sharded": "sample state",
    "taught": "teacher rows",
    "settle": "resolve",
    "agree": "reduce_status",
    "descend": "optimizer_step",
    "remember": "snapshot_buffers",
    "told": "signals received",
    "leave": "exit with a code",
    "stopwatch": "phase timer",
    "logbook": "metrics logger",
    "pull": "embedding gradients",
    "apart": "exclude_same_id",
    "every": "gathered, for the whole batch's table",
}
# The same, for words that are ordinary English elsewhere: only in these rooms did they stand for the concept.
IN_ROOMS = {
    ("objectives", "similarity"): {
        "way": "direction",
        "there": "direction, anchor to candidate",
        "back": "direction, candidate to anchor",
        "which": "pair mask",
        "some": "pair mask, or tile",
        "spare": "tile",
    },
    ("model", "objectives"): {
        "follow": "update_ema",
        "behind": "append_queue",
        "beside": "add_views, teacher rows",
    },
    ("training", "engine"): {"place": "train state", "finish": "shutdown"},
}
# Names that are wrong whole, though each of their words is right elsewhere.
WHOLE = {
    "Alone": "SingleProcess",
    "Ranks": "ProcessGroup",
    "Place": "TrainState",
    "put_back": "restore_buffers",
    "moving": "moving average",
}


def words(name: str) -> list[str]:
    """`max_badShare` and `MaxBadShare` are max, bad, share."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def defined(tree: ast.Module, module: str) -> Iterator[str]:
    """Names that a file gives: itself, classes, functions, parameters, attributes and variables.

    Fields of settings are keys of recipes, which keep their names.
    """
    yield module
    keys = {
        id(field.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(re.search("Config|Kind", ast.unparse(base)) for base in node.bases)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in keys:
            yield node.id
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def wrong(path: str, source: str) -> Iterator[str]:
    """`path: name: say ...` of each name with a word that was given up; paths begin with mvpretrain/ or tools/."""
    room, module = path.split("/")[1].removesuffix(".py"), Path(path).stem
    given_up = dict(EVERYWHERE)
    for rooms, here in IN_ROOMS.items():
        given_up |= here if room in rooms else {}
    for name in dict.fromkeys(defined(ast.parse(source), module)):
        say = [WHOLE[name]] if name in WHOLE else [given_up[word] for word in words(name) if word in given_up]
        if say:
            yield f"{path}: {name}: say {', '.join(say)}"


def test_no_name_is_a_word_that_was_given_up() -> None:
    files = sorted(f for folder in ("mvpretrain", "tools") for f in (ROOT / folder).rglob("*.py"))
    found = [line for f in files for line in wrong(f.relative_to(ROOT).as_posix(), f.read_text())]
    assert len(files) > 100 and not found, "\n".join(found)


@pytest.mark.parametrize(("path", "source", "name"), [
    ("objectives/a.py", "class ForeignObjective: ...", "ForeignObjective"),
    ("distributed/a.py", "class Alone: ...", "Alone"),
    ("distributed/a.py", "def swap(x): ...", "swap"),
    ("engine/a.py", "def f(tell, *, told): ...", "told"),
    ("model/a.py", "class A:\n    def __init__(self):\n        self.stop_watch, self.stopwatch = 1, 2", "stopwatch"),
    ("similarity/a.py", "for there in x: ...", "there"),
    ("objectives/a.py", "def f(loss_every): ...", "loss_every"),
    ("training/a.py", "with open(x) as place: ...", "place"),
    ("distributed/keyed.py", "", "keyed"),
    ("cli/a.py", "import x as doorOpener", "doorOpener"),
])  # fmt: skip
def test_a_wrong_name_is_seen(path: str, source: str, name: str) -> None:
    found = list(wrong(f"mvpretrain/{path}", source))
    assert [line.split(": ")[1] for line in found] == [name]


def test_right_names_pass() -> None:
    config = "class LogConfig(Config):\n    every: int = 10"
    ordinary = "there = place = 1\nrun.finish()\nwidth = config.every"
    assert not list(wrong("mvpretrain/loggers/a.py", config)) and not list(wrong("mvpretrain/data/a.py", ordinary))

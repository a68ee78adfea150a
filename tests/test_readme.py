"""The README against the disk: its tree, its commands and options, its recipe, its Python."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import mvpretrain
from mvpretrain import recipe
from mvpretrain.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# A file or a folder as the tree names it: `views/`, `image.py`, `.ci/`, `LICENSE`.
NAME = re.compile(r"(?<![\w./`-])(\.?[\w-]+/|\.?[\w-]+\.(?:py|sh|toml|md)|LICENSE|\.gitignore)(?![\w/-])")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def on_disk() -> set[str]:
    """Files that git has or would take, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip(f"the tree is compared with what git lists, which it does not here: {listed.stderr.strip()}")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def tree() -> set[str]:
    """Every path that the tree names. Indentation says in which folder: of a package's line, or of the line above."""
    block = TEXT.partition("\n## The tree\n")[2].partition("```\n")[2].partition("\n```")[0]
    assert block.startswith("mvpretrain/"), "the section 'The tree' has no fenced block"
    named: set[str] = set()
    top = folder = ""
    for line in block.splitlines():
        names = NAME.findall(line)
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            top = folder = names[0] if names[0].endswith("/") else ""
        elif depth == 2:
            folder = top + (names[0] if names[0].endswith("/") else "")
        opens = depth <= 2 and folder.endswith("/") and line.strip().startswith(names[0]) and names[0].endswith("/")
        if opens:
            named.add(folder)
        named |= {folder + name for name in names[opens:]}
    return named


def test_the_tree_names_what_is_there_and_nothing_else() -> None:
    found, named = on_disk(), tree()
    top = {name.split("/")[0] + "/" * ("/" in name) for name in found}
    house = {name for name in found if name.startswith("mvpretrain/")}
    folders = {str(Path(name).parent) + "/" for name in house}
    # A folder's own registry is the folder.
    expected = top | folders | {name for name in house if not re.search(r"/\w+/__init__\.py$", name)}
    assert expected - named == set(), "not in the README's tree"
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set(), "in the README's tree, and not on the disk"


def commands() -> Iterator[list[str]]:
    """`mvpretrain ...` as it is written in code blocks and in the table of launchers, word by word."""
    quoted = re.findall(r"`([^`\n]*\bmvpretrain [a-z][^`\n]*)`", TEXT)
    for line in [*"\n".join(blocks("bash")).splitlines(), *quoted]:
        if found := re.search(
            r"(?:^|-m |--module |\s)mvpretrain ((?:train|export|evaluate|embed|shards|recipe)\b.*)", line
        ):
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    command: Any = get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{words} after {command.name}: {sorted(command.commands)}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        assert not word.startswith("-") or word.partition("=")[0] in known, f"{command.name} has no {word}: {known}"
    for setting in (word for word in words if "=" in word and not word.startswith("-")):
        place: Any = recipe.parse(README_RECIPE).model_dump()
        for key in setting.partition("=")[0].split("."):
            assert key in place, setting
            place = place[key]


def test_the_walk_meets_the_commands() -> None:
    found = {words[0] for words in commands()}
    assert found == {"train", "export", "evaluate", "embed", "shards", "recipe"}
    assert len(list(commands())) > 12


README_RECIPE = yaml.safe_load(blocks("yaml")[0])


def test_the_recipe_is_one() -> None:
    assert len(blocks("yaml")) == 1
    found = recipe.parse(README_RECIPE)
    assert recipe.parse(yaml.safe_load(found.dump())) == found
    assert recipe.parse({**README_RECIPE, "data": {"kind": "synthetic"}}).data.kind == "synthetic"


def test_paths_exist() -> None:
    words = {
        word.strip("`'\",;:()") for text in [*blocks("bash"), *re.findall(r"`[^`\n]+`", TEXT)] for word in text.split()
    }
    paths = {word for word in words if re.match(r"(launch|recipes|tools|tests|mvpretrain)/[\w./-]+$", word)}
    assert {"launch/quickstart.sh", "launch/test.sh"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_python_names_what_the_package_has() -> None:
    for text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("mvpretrain"):
                owner: Any = mvpretrain
                for part in ast.unparse(node).split(".")[1:]:
                    owner = getattr(owner, part)
    assert blocks("python")

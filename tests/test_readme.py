"""The pages against the disk: their maps and tables, commands and options, recipes, Python, links and pictures."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command

from mvpretrain import objectives, recipe
from mvpretrain.cli import app
from mvpretrain.shards.pack import write
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        "README.md",
        "mvpretrain/README.md",
        "mvpretrain/objectives/README.md",
        "recipes/README.md",
        "launch/README.md",
        "tools/README.md",
    )
}
RECIPE = "recipes/README.md"  # the page whose YAML is a whole recipe
CODE = re.compile(r"`([^`\n]+)`")
TOP_FILES = {".gitignore", ".pre-commit-config.yaml", "LICENSE", "README.md", "pyproject.toml"}
PACKAGE_FILES = {"__init__", "__main__", "config", "files", "recipe", "registry", "types"}


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def section(page: str, title: str) -> str:
    _, found, rest = PAGES[page].partition(f"\n## {title}\n")
    assert found, f"{page} has no section {title!r}"
    return rest.partition("\n## ")[0]


@cache
def on_disk() -> frozenset[str]:
    """Files that git has or would take, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip(f"pages are compared with what git lists, which it does not here: {listed.stderr.strip()}")
    return frozenset(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def inside(folder: str, ending: str = "") -> set[str]:
    """The files of a folder and of those in it, relative to it."""
    return {n.removeprefix(folder) for n in on_disk() if n.startswith(folder) and n.endswith(ending)}


# Maps and tables


def tree() -> list[str]:
    """Every path that the package's map names, in its order.

    A line is names, two spaces and what they are; its indentation says in which folder.
    """
    named: list[str] = []
    folders: list[str] = []
    for line in blocks("mvpretrain/README.md", "")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        del folders[depth:]
        assert len(folders) == depth, f"not in any folder: {line!r}"
        named += ["".join(folders) + name for name in names]
        if names[0].endswith("/"):
            folders.append(names[0])
    return named


def test_the_map_names_what_is_there_and_nothing_else() -> None:
    files = {name for name in inside("mvpretrain/", ".py") if not name.endswith("__init__.py")}
    rooms = {str(Path(name).parent) + "/" for name in inside("mvpretrain/", ".py") if "/" in name}
    assert files | rooms == set(tree()), "on one side only, mvpretrain/README.md's map or the disk"
    assert len(tree()) == len(set(tree())), "a name stands twice"


def test_the_map_is_in_the_order_of_the_floors() -> None:
    floors = [FLOORS[name.strip("/").removesuffix(".py")] for name in tree() if "/" not in name.rstrip("/")]
    assert floors == sorted(floors)


def test_the_root_of_the_package_holds_few_files() -> None:
    assert {name.removesuffix(".py") for name in inside("mvpretrain/", ".py") if "/" not in name} == PACKAGE_FILES


def test_the_top_level_is_what_the_readme_says() -> None:
    top = {name.split("/")[0] + "/" * ("/" in name) for name in on_disk()}
    named = set(re.findall(r"(?<![\w/])(\.?\w+/)(?=[`\]])", section("README.md", "Where to read on")))
    assert {name for name in top if name.endswith("/")} == named
    assert {name for name in top if not name.endswith("/")} == TOP_FILES


def test_tables_name_every_tool_recipe_and_launcher_file() -> None:
    tools: set[str] = set()
    for folder, rows in re.findall(
        r"^\| `(tools/\w+/)` \|[^\n]*\n\|[-|]+\n((?:\|.*\n)+)", PAGES["tools/README.md"], re.M
    ):
        tools |= {folder + name for row in rows.splitlines() for name in CODE.findall(row.split("|")[1])}
    assert tools == {f"tools/{name}" for name in inside("tools/", ".py") if not name.endswith("__init__.py")}
    table = PAGES["recipes/README.md"].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", table, re.M)) == inside("recipes/", ".yaml")
    table = PAGES["launch/README.md"].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w./]+)` \|", table, re.M)) == inside("launch/") - {"README.md"}


def test_tables_of_objectives_name_every_kind_and_no_other() -> None:
    kinds = objectives.registry.kinds()
    table = section("mvpretrain/objectives/README.md", "What they compute")
    assert sorted(re.findall(r"^\| `(\w+)` \|", table.replace("| `kind` |", ""), re.M)) == kinds
    chosen = re.findall(r"^\| [^`|]+ \| `(\w+)`", section("README.md", "What you have, and which objective"), re.M)
    assert len(chosen) > 8 and set(chosen) <= set(kinds)


# Commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of `mvpretrain ...` as it is written in blocks of code and in tables."""
    for page, text in PAGES.items():
        lines = [*"\n".join(blocks(page, "bash")).splitlines(), *CODE.findall(text)]
        for line in lines:
            if found := re.search(r"(?:^|-m |--module |\s)mvpretrain ([a-z]+ .*)", line):
                yield page, [word for word in shlex.split(found[1], comments=True) if word != "..."]


def test_commands_exist() -> None:
    groups: set[str] = set()
    settings = recipe.parse(yaml.safe_load(blocks(RECIPE, "yaml")[0])).model_dump()
    for page, words in commands():
        command: Any = get_command(app)
        groups.add(words[0])
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, f"{page}: no {words} in {sorted(command.commands)}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            assert not word.startswith("-") or word.partition("=")[0] in known, f"{page}: {command.name} has no {word}"
            if "=" in word and not word.startswith("-"):
                refuse_unknown_setting(page, word, settings)
    assert groups == set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]


def refuse_unknown_setting(page: str, word: str, settings: dict[str, Any]) -> None:
    group: Any = settings
    for key in word.partition("=")[0].split("."):
        assert isinstance(group, dict) and key in group, f"{page}: a recipe has no {word}"
        group = group[key]


def test_modules_and_paths_exist() -> None:
    modules: set[str] = set()
    for page, text in PAGES.items():
        modules |= set(re.findall(r"python -m (tools(?:\.\w+)+)", text))
        words = {
            word.strip("`'\",;:()") for code in [*blocks(page, "bash"), *CODE.findall(text)] for word in code.split()
        }
        paths = {word for word in words if re.match(r"(launch|recipes|tools|tests|\.github)/[\w./-]+$", word)}
        assert [path for path in sorted(paths) if not (ROOT / path).exists()] == [], page
    assert len(modules) > 8
    assert [name for name in sorted(modules) if find_spec(name) is None] == []


def test_the_way_names_files_and_functions_that_are_there() -> None:
    """In "One sample's way" a name in backticks is a file, or defined in one of the files named there."""
    text = section("mvpretrain/README.md", "One sample's way")
    files = [name for name in CODE.findall(text) if name.endswith(".py")]
    assert len(files) > 20 and [name for name in files if not (ROOT / "mvpretrain" / name).exists()] == []
    defined: set[str] = set()
    for name in files:
        for node in ast.walk(ast.parse((ROOT / "mvpretrain" / name).read_text())):
            if isinstance(node, ast.ClassDef):
                methods = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
                defined |= {node.name, *(f"{node.name}.{method}" for method in methods)}
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
    named = {name for name in CODE.findall(text) if re.fullmatch(r"_?[A-Z]\w+(\.\w+)?|[a-z]+_\w+", name)}
    assert len(named) > 25 and named - defined == set()


# Recipes and Python


def test_the_recipe_is_one() -> None:
    found = recipe.parse(yaml.safe_load(blocks(RECIPE, "yaml")[0]))
    assert recipe.parse(yaml.safe_load(found.dump())) == found


def test_moco_is_written_as_a_recipe_takes_it() -> None:
    views = ["a", "b", "a@teacher", "b@teacher"]
    (text,) = blocks("mvpretrain/objectives/README.md", "yaml")
    objectives.build(yaml.safe_load(text)["objective"], views)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's after its commands: `mine.yaml` as `recipe new` writes it from a few samples."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    samples = [{"__key__": f"k{i}", "npy": random.standard_normal(4), "txt": f"a photo of {i}"} for i in range(48)]
    Path("data/mine").mkdir(parents=True)
    write(samples, Path("data/mine"), "shard")
    app(["recipe", "new", "data/mine/*.tar", "--out", "mine.yaml"], standalone_mode=False)
    pages = [page for page in PAGES if blocks(page, "python")]
    assert pages == ["README.md", "mvpretrain/README.md", "mvpretrain/objectives/README.md"]
    for page in pages:
        for text in blocks(page, "python"):
            scope: dict[str, Any] = {}
            exec(compile(text, page, "exec"), scope)
            if page == "README.md":
                assert scope["vectors"].shape == (1, scope["encoder"].dim)


# Pages


def test_the_readme_is_read_in_a_minute() -> None:
    assert PAGES["README.md"].count("\n") <= 150


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    met = 0
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            found = ((ROOT / page).parent / name).resolve() if name else ROOT / page
            assert found.exists() and found.is_relative_to(ROOT), f"{page}: {target} leads nowhere"
            assert not anchor or anchor in anchors(found), f"{page}: {target}: no such heading"
            met += 1
    assert met > 12


def test_pictures_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGES["README.md"])
    assert pictures and all((ROOT / name).stat().st_size < 300_000 for name in pictures)

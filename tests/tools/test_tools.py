"""Every tool starts by its module's name, and whatever names a tool names one that is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tools").rglob("*.py"))
# unchanged_probe.py is started by its path, beside any state of the package, and imports nothing of the tools.
STARTED = [
    ".".join(path.with_suffix("").parts)
    for path in FILES
    if "\nif __name__ ==" in (ROOT / path).read_text() and path.stem != "unchanged_probe"
]
# `tools.bench.step`, `tools/bench/step.py`; in one folder also `bench_step`, as tools were called once.
NAMED = re.compile(r"\btools[./](\w+[./]\w+|\w+\.py)|\b((?:bench|make)_(?:\w+\.py|\*))")


@pytest.mark.parametrize("name", STARTED)
def test_it_says_what_it_is_for_and_how_it_is_started(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0 and f"python -m {name}" in capsys.readouterr().out


def unknown(text: str) -> list[str]:
    """The tools named in a text that are not there."""
    modules = {f"{path.parent.name}/{path.stem}" for path in FILES}
    found = []
    for match in NAMED.finditer(text):
        name = (match[1] or "").replace(".", "/").removesuffix("/py")
        if name not in modules and "/".join(name.split("/")[:2]) not in modules:
            found.append(match[0])
    return found


def test_tools_are_named_as_they_are_called() -> None:
    folders = ("mvpretrain", "recipes", "launch", "tools", ".github")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")
    ]
    files += [ROOT / "pyproject.toml"]
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in unknown(path.read_text())]
    wrong = [line for line in wrong if "unchanged_runs.py" not in line]  # it also runs the tools of older states
    assert len(STARTED) > 15 and not wrong, "\n".join(wrong)


def test_another_name_is_seen() -> None:
    assert unknown("tools.bench.step, tools/data/digits.py, tools/data/*.py") == []
    assert unknown("python -m tools.bench.steps") == ["tools.bench.steps"]
    assert unknown("tools/make_digits.py or tools/data.py or bench_step.py or tools/make_*.py") == [
        "tools/make_digits.py", "tools/data.py", "bench_step.py", "make_*"
    ]  # fmt: skip

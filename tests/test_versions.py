"""The versions that launch/ states against the bounds of pyproject.toml, and the page of formats."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mvpretrain.files import FORMATS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_TESTED_WITH = {"ruff", "pyright"}  # style and types are checked under the tried versions alone


def bounds() -> dict[str, Requirement]:
    """What mvpretrain[dev] asks for by itself, by canonical name."""
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(line for name, lines in extras.items() if name != "peers" for line in lines)]
    found = [Requirement(line) for line in listed]
    return {canonicalize_name(r.name): r for r in found if r.name != "mvpretrain"}


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / "launch" / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(r.specifier).startswith("==") for r in found)
    return {canonicalize_name(r.name): Version(str(r.specifier)[2:]) for r in found}


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    stated = {name: Version(str(r.specifier).removeprefix(">=")) for name, r in bounds().items()}
    assert pins("lowest.txt") == {name: v for name, v in stated.items() if name not in NOT_TESTED_WITH}


def test_the_tried_versions_are_within_the_bounds() -> None:
    tried = pins("constraints.txt")
    assert bounds().keys() <= tried.keys()
    outside = [name for name, r in bounds().items() if not r.specifier.contains(tried[name])]
    assert not outside


@pytest.mark.parametrize("noun", FORMATS)
def test_every_change_of_a_format_is_told(noun: str) -> None:
    page = (ROOT / ".github/CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith(f"| {noun} |")]
    assert [int(number) for _, number in rows] == list(range(1, FORMATS[noun] + 1))

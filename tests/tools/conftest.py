"""Tools as modules: `python -m tools.compare.runs` is `tool("compare.runs")` here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def tool() -> Callable[[str], ModuleType]:
    """`tool("data.digits")`: the module tools/data/digits.py."""
    return lambda name: importlib.import_module(f"tools.{name}")

"""The program as it is typed, run in this process in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mvpretrain import cli, engine

RECIPE = """
run: run
data: {kind: synthetic, samples: 48, eval_samples: 16}
views:
  a: {kind: vector, field: a, dim: 4}
  b: {kind: vector, field: b, dim: 4}
towers:
  a: {encoder: {kind: mlp, input: 4, width: 8}}
  b: {encoder: {kind: mlp, input: 4, width: 8}}
objective: {kind: infonce}
dim: 4
batch: 8
steps: 2
loader: {workers: 0}
log: {tensorboard: false}
engine: {kind: none, device: cpu}
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Program = Callable[..., Ended]


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """`program("train", "r.yaml")`: `mvpretrain train r.yaml` in a folder that holds r.yaml, in this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine, "shutdown", sys.exit)  # the real one ends the process without pytest's leave
    Path("r.yaml").write_text(RECIPE)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mvpretrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return call

"""The wheel alone, installed into an empty environment: all of the package, nothing else, and it runs from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

import mvpretrain
from mvpretrain.shards.pack import write

ROOT = Path(__file__).parents[1]
BOTH = """
from mvpretrain.cli import app
import mvpretrain, sys
assert mvpretrain.__file__.startswith(sys.prefix), mvpretrain.__file__
app(["recipe", "new", "s-000000.tar", "--out", "mine.yaml"], standalone_mode=False)
engine = ["loader.workers=0", "engine={kind: none, device: cpu}", "log.tensorboard=false"]
data = ["data={kind: synthetic, samples: 32, eval_samples: 0}", "epochs=null", "steps=2"]
app(["train", "mine.yaml", *engine, *data], standalone_mode=False)
"""


def package() -> set[str]:
    files = (path.relative_to(ROOT).as_posix() for path in (ROOT / "mvpretrain").rglob("*") if path.is_file())
    return {name for name in files if "__pycache__" not in name and not name.endswith(".md")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder behind that would find its way into the next wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "mvpretrain", source / "mvpretrain", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("recipes", "tools"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out)]
    run([sys.executable, "-m", "pip", *command, str(source)], out)
    return next(out.glob("*.whl"))


def run(command: list[str], folder: Path) -> str:
    """What a command prints in a folder where no checkout is in reach."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_it_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - package() == set(), "not of the package"
    assert package() - names == set(), "left out: a folder without __init__.py, or package data"
    assert "mvpretrain/py.typed" in names


def test_it_runs_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, symlinks=True, with_pip=False)
    python = str(home / "bin/python")
    command = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run([sys.executable, "-m", "pip", *command], tmp_path)
    # The dependencies are those of this environment; .pth files in there, such as an editable install's, are not read.
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (next(home.glob("lib/python*/site-packages")) / "dependencies.pth").write_text("\n".join(here))
    assert run([str(home / "bin/mvpretrain"), "--version"], tmp_path) == f"mvpretrain {mvpretrain.__version__}\n"
    random = np.random.default_rng(0)
    arrays = [{f: random.standard_normal(4) for f in ("a.npy", "b.npy")} for _ in range(32)]
    write([{"__key__": f"k{i}"} | sample for i, sample in enumerate(arrays)], tmp_path, "s")
    printed = run([python, "-c", BOTH], tmp_path)
    assert "mine.yaml: a (vector), b (vector)" in printed and "done: runs/mine" in printed
    assert (tmp_path / "runs/mine/checkpoints/step-00000002/weights.safetensors").is_file()

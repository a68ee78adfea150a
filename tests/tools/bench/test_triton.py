"""tools/bench/triton.py says where it cannot measure, and takes no settings that make no sense."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("tools.bench.triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--n", "64", "--d", "8", "--dtype", "float32"]) == 2
    assert capsys.readouterr().out == "bench_fused.py measures on a GPU, and torch sees no CUDA device here.\n"


@pytest.mark.parametrize("wrong", [["--n", "0"], ["--dtype", "int8"], ["--pairs", "3"]], ids=" ".join)
def test_wrong_settings_are_refused(bench: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_small_run_on_a_gpu(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--n", "2048", "--d", "64", "--repeats", "2"]) == 0
    assert "of the card's rate" in capsys.readouterr().out

"""`mvpretrain recipe new`: what it writes is commented line by line, resolves, fits its shards, and trains."""

from __future__ import annotations

import io
import json
import math
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mvpretrain.shards.pack import write
from tests.cli.conftest import RECIPE, Program


def picture(i: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def sound(i: int) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        noise = np.random.default_rng(i).normal(0, 3000, 1600 + 10 * i)
        file.writeframes(noise.astype("<i2").tobytes())
    return stream.getvalue()


def image_and_text(i: int) -> dict[str, Any]:
    return {"png": picture(i), "txt": f"caption {i}", "cls": i % 3}


def sound_and_array(i: int) -> dict[str, Any]:
    return {"wav": sound(i), "npy": np.random.default_rng(i).normal(3, 2, 9).astype(np.float32)}


def with_unknown_fields(i: int) -> dict[str, Any]:
    # A line break in a field's name must not become a line of the recipe.
    return image_and_text(i) | {"blob": b"\0", "x\nseed: 99\n.bin": b"\0", "yes.npy": np.arange(4) + i}


@pytest.mark.parametrize("sample", [image_and_text, sound_and_array, with_unknown_fields], ids=lambda s: s.__name__)
def test_what_is_written_trains(program: Program, sample: Callable[[int], dict[str, Any]]) -> None:
    if sample is sound_and_array:
        pytest.importorskip("soundfile", reason="sound is decoded by soundfile")
    write([{"__key__": f"k{i}"} | sample(i) for i in range(32)], Path(), "s", shard_samples=24)
    ended = program("recipe", "new", "s-*.tar", "--out", "mine.yaml")
    assert (ended.code, ended.err) == (0, "") and "mine.yaml: " in ended.out, ended
    text = Path("mine.yaml").read_text()
    assert all("#" in line for line in text.splitlines()), text
    written = yaml.safe_load(text)
    assert written["data"]["eval"] == "s-000001.tar" and "seed" not in written
    if sample is with_unknown_fields:
        assert "# Not a view: blob: nothing here reads the ending 'blob'." in text
        assert set(written["views"]) == {"image", "text", "yes"} and "not a view: blob: " in ended.out
    here = ["loader.workers=0", "engine={kind: none, device: cpu}", "log={tensorboard: false, every: 1}"]
    plan = program("train", "mine.yaml", *here, "--dry-run")
    assert plan.code == 0 and "24 held out" not in plan.out and "8 held out" in plan.out, plan
    assert program("train", "mine.yaml", *here, "epochs=null", "steps=3").code == 0
    records = [json.loads(line) for line in Path("runs/mine/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert all(record["skipped"] == 0 for record in records if "loss" in record)


def test_it_is_printed_and_overwrites_nothing(program: Program) -> None:
    write([{"__key__": f"k{i}"} | image_and_text(i) for i in range(8)], Path(), "s")
    printed = program("recipe", "new", "s-000000.tar").out
    assert yaml.safe_load(printed)["run"] == "runs/first" and "eval: null" in printed
    ended = program("recipe", "new", "s-000000.tar", "--out", "r.yaml")
    assert (
        ended.code == 2 and "'r.yaml' exists; give another file" in ended.err and Path("r.yaml").read_text() == RECIPE
    )
    assert program("recipe", "new", "nothing.tar").code == 2

"""Whole runs on shards that are few, damaged or incomplete: they finish and count, or stop and name the fault."""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from mvpretrain import recipe
from mvpretrain.data.build import build_stream, count_samples
from mvpretrain.data.loader import Stream
from mvpretrain.distributed.pool import Pool
from mvpretrain.shards.pack import array_bytes
from mvpretrain.training.train import train


def settings(folder: Path, train: str, **changes: Any) -> dict[str, Any]:
    """A run of 25 steps of 8 samples, just beyond the 200 after which the share of bad ones counts."""
    encoders = {"image": {"kind": "mlp", "input": 16, "width": 8}, "vector": {"kind": "mlp", "input": 4, "width": 8}}
    return {
        "run": str(folder / "run"),
        "data": {"kind": "shards", "train": train},
        "views": {
            "image": {
                "kind": "image",
                "field": "png",
                "size": 4,
                "channels": 1,
                "normalize": "half",
                "augment": "none",
            },
            "vector": {"kind": "vector", "field": "npy", "dim": 4},
        },
        "towers": {name: {"encoder": encoder} for name, encoder in encoders.items()},
        "objective": {"kind": "infonce"},
        "dim": 4,
        "batch": 8,
        "steps": 25,
        "loader": {"workers": 0},
        "log": {"every": 5, "tensorboard": False},
        "engine": {"device": "cpu", "threads": 1},
        **changes,
    }


def samples(count: int, start: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(start)
    made = []
    for i in range(start, start + count):
        picture = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (4, 4), dtype=np.uint8)).save(picture, "PNG")
        vector = random.standard_normal(4).astype(np.float32)
        made.append({"__key__": f"s{i:04d}", "png": picture.getvalue(), "npy": vector})
    return made


def write(folder: Path, *shards: Sequence[dict[str, Any]]) -> str:
    """Tars of these samples; the pattern that names them all."""
    for number, listed in enumerate(shards):
        with TarWriter(str(folder / f"t-{number}.tar"), encoder=encoded) as tar:
            for sample in listed:
                tar.write(dict(sample))
    return str(folder / "t-*.tar")


def encoded(sample: dict[str, Any]) -> dict[str, Any]:
    return {k: array_bytes(v) if isinstance(v, np.ndarray) else v for k, v in sample.items()}


def end_of(run: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What the last checkpoint says, and the log."""
    last = max((run / "checkpoints").glob("step-*"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return json.loads((last / "meta.json").read_text()), log


def run_of_rank(rank: int, value: dict[str, Any]) -> list[float]:
    """The whole program on this rank; its losses."""
    before = multiprocessing.get_start_method()
    # The pool's ranks come from a fork server, and their workers would too; a launcher's ranks fork theirs.
    multiprocessing.set_start_method("fork", force=True)
    try:
        run = train(recipe.parse(value))
    finally:
        multiprocessing.set_start_method(before, force=True)
    return [record["loss"] for record in end_of(run)[1] if "loss" in record]


def test_one_shard_on_four_ranks_with_two_workers_each(tmp_path: Path, ranks: Callable[[int], Pool]) -> None:
    log = {"every": 1, "tensorboard": False}
    value = settings(tmp_path, write(tmp_path, samples(40)), steps=6, loader={"workers": 2}, log=log)
    together = ranks(4).run(run_of_rank, value, timeout=120)
    alone = train(recipe.parse({**value, "run": str(tmp_path / "alone"), "loader": {"workers": 0}}))
    expected = [record["loss"] for record in end_of(alone)[1]]
    assert together == [pytest.approx(expected, rel=1e-4)] * 4 and len(expected) == 6


@pytest.mark.parametrize("policy", ["some", "none"])
def test_shard_without_a_field_stops_the_run_at_once(tmp_path: Path, policy: str) -> None:
    lacking = [{k: v for k, v in sample.items() if k != "npy"} for sample in samples(10, 10)]
    value = settings(tmp_path, write(tmp_path, samples(10), lacking))
    value["views"]["vector"]["missing"] = policy
    begun = time.monotonic()
    with pytest.raises(ValueError) as caught:
        train(recipe.parse(value))
    assert time.monotonic() - begun < 5
    for word in ("t-1.tar", "npy", "'vector'", "views.vector.missing"):
        assert word in str(caught.value), caught.value
    assert not (tmp_path / "run").exists()


def test_samples_without_a_view_are_trained_on(tmp_path: Path) -> None:
    made = samples(40)
    for sample in made[::3]:
        del sample["npy"]
    value = settings(tmp_path, write(tmp_path, made[:20], made[20:]))
    meta, log = end_of(train(recipe.parse(value)))
    assert meta["skipped"] == {} and log[-1]["skipped"] == 0
    assert all(np.isfinite(record["loss"]) for record in log)


def test_undecodable_images_are_counted_and_stop_the_run_above_the_limit(tmp_path: Path) -> None:
    made = samples(40)
    made[7]["png"] = b"no image"
    made[21]["png"] = made[21]["png"][:-30]
    value = settings(tmp_path, write(tmp_path, made), loader={"workers": 0, "max_bad_share": 0.06})
    meta, log = end_of(train(recipe.parse(value)))
    assert list(meta["skipped"].values()) == [5, 5], meta["skipped"]  # 200 samples are five epochs of 40
    assert all(reason.startswith("image: ") for reason in meta["skipped"]), meta["skipped"]
    assert log[-1]["skipped"] == 10 and log[0]["skipped"] == 2
    strict = {**value, "run": str(tmp_path / "strict"), "loader": {"workers": 0, "max_bad_share": 0.04}}
    with pytest.raises(ValueError) as caught:
        train(recipe.parse(strict))
    for word in ("10 of 200 samples", *meta["skipped"], "max_bad_share is 4.00%", "mvpretrain shards check"):
        assert word in str(caught.value), caught.value


def test_tar_that_was_cut_off_before_the_run_is_used_up_to_there_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = write(tmp_path, samples(20), samples(20, 20))
    cut = tmp_path / "t-1.tar"
    cut.write_bytes(cut.read_bytes()[: 5 * 4096 + 1600])  # a sample takes 4096 bytes here
    run = train(recipe.parse(settings(tmp_path, urls)))
    out = capsys.readouterr().out
    assert str(cut) in out and "cut inside 's0025." in out, out
    assert end_of(run)[0]["step"] == 25
    recipe_of_25 = recipe.parse(settings(tmp_path, urls))
    stream = recipe_of_25.stream("train", 0, 1)
    assert stream is not None and count_samples(stream.sources) == 25


def test_tar_that_is_cut_off_under_a_run_is_counted_and_stops_it_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path, samples(30), samples(10, 30))
    shard = tmp_path / "t-1.tar"
    content, build = shard.read_bytes(), build_stream

    def cut_after_indexing(*arguments: Any, **named: Any) -> Stream | None:
        shard.write_bytes(content)
        stream = build(*arguments, **named)
        shard.write_bytes(content[:600])
        return stream

    monkeypatch.setattr("mvpretrain.recipe.build_stream", cut_after_indexing)
    value = settings(tmp_path, whole, loader={"workers": 0, "max_bad_share": 0.3})
    meta, _ = end_of(train(recipe.parse(value)))
    assert meta["skipped"] == {f"truncated {shard}": 50}  # ten in each of five epochs
    strict = {**value, "run": str(tmp_path / "strict"), "loader": {"workers": 0}}
    with pytest.raises(
        ValueError, match=r"50 of 200 samples could not be used: truncated .*t-1\.tar 50; max_bad_share"
    ):
        train(recipe.parse(strict))

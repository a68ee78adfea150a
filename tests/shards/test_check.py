"""Every kind of damage is found, counted and named, and sound shards pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvpretrain.shards.check import check
from mvpretrain.shards.pack import write
from mvpretrain.types import View
from tests.shards.samples import picture, tone


def sample(key: str, **fields: Any) -> dict[str, Any]:
    return {"__key__": key, "jpg": picture(), "txt": "wörter", "npy": np.ones(3), "cls": 1} | fields


def test_sound_shards_are_good(tmp_path: Path) -> None:
    write([sample(f"{i}", json={"a": 1}, wav=tone()) for i in range(5)], tmp_path, "x", shard_samples=2)
    report = check(str(tmp_path))
    assert report.good and report.samples == report.ok == 5 and report.missing == {} and report.examples == ()


@pytest.mark.parametrize(
    ("field", "raw", "reason"),
    [
        ("jpg", picture()[:-300], "jpg: OSError"),
        ("jpg", b"<html>", "jpg: UnidentifiedImageError"),
        ("npy", b"no array", "npy: ValueError"),
        ("txt", b"caf\xe9", "txt: UnicodeDecodeError"),
        ("txt", b"", "txt: Empty"),
        ("json", b"{", "json: JSONDecodeError"),
        ("wav", b"RIFF", "wav: LibsndfileError"),
        ("wav", tone(0), "wav: ValueError"),
    ],
)
def test_what_does_not_decode_is_named(tmp_path: Path, field: str, raw: bytes, reason: str) -> None:
    if field == "wav":
        pytest.importorskip("soundfile", reason="sound is decoded by soundfile")
    write([sample(f"{i}", **{field: raw} if i == 3 else {}) for i in range(5)], tmp_path, "x", shard_samples=2)
    report = check(str(tmp_path))
    assert not report.good and (report.samples, report.ok) == (5, 4) and report.reasons == {reason: 1}
    (found,) = report.examples
    assert (Path(found.shard).name, found.key, found.field) == ("x-000001.tar", "3", field)
    assert " at 0x" not in found.reason


def test_a_class_that_is_no_integer_is_named(tmp_path: Path) -> None:
    path = write([sample("a"), sample("b")], tmp_path, "x").shards[0]
    path.write_bytes(path.read_bytes().replace(b"1" + bytes(511), b"?" + bytes(511), 1))
    assert check(str(path)).reasons == {"cls: ValueError": 1}


def test_a_frequent_problem_does_not_hide_a_rare_one(tmp_path: Path) -> None:
    write([sample(f"{i:03d}", jpg=b"?") for i in range(30)] + [sample("last", npy=b"?")], tmp_path, "x")
    report = check(str(tmp_path), examples=3)
    assert [e.key for e in report.examples] == ["000", "001", "last"]
    assert report.reasons == {"jpg: UnidentifiedImageError": 30, "npy: ValueError": 1} and report.ok == 0


def test_truncated_and_foreign_files_are_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    shards = write([sample(f"{i}") for i in range(9)], tmp_path, "x", shard_samples=3).shards
    shards[0].write_bytes(shards[0].read_bytes()[:-12_000])
    shards[1].write_bytes(b"not a tar" * 300)
    report = check([str(s) for s in shards])
    assert not report.good and {Path(s).name for s in report.truncated} == {"x-000000.tar", "x-000001.tar"}
    assert 3 <= report.samples < 6 and report.ok == report.samples


def test_missing_fields_are_counted_by_shard_and_are_no_fault(tmp_path: Path) -> None:
    rows = [sample(f"{i}") for i in range(4)]
    del rows[2]["txt"], rows[3]["txt"], rows[3]["npy"]
    shards = write(rows, tmp_path, "x", shard_samples=2).shards
    report = check(str(tmp_path))
    assert report.good and report.missing == {str(shards[1]): {"npy": 1, "txt": 2}}


def test_repeated_keys(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write([sample("a"), sample(f"b-{name}")], tmp_path, name)
    assert check(str(tmp_path)).duplicates == ("a",) and not check(str(tmp_path)).good
    assert check(str(tmp_path), ids="shard").good and check(str(tmp_path), ids="key").good


def test_unknown_endings_are_said_to_be_unchecked(tmp_path: Path) -> None:
    write([sample("a", mp4=b"film"), sample("b")], tmp_path, "x")
    report = check(str(tmp_path))
    assert report.good and report.unchecked == {"mp4": 1}


def test_views_are_made_and_must_be_finite(tmp_path: Path) -> None:
    def vector(raw: bytes) -> View:
        return View(torch.tensor(json.loads(raw)).float().log())

    rows = [{"__key__": "a", "json": [1]}, {"__key__": "b", "jsn": [0]}, {"__key__": "c", "txt": "x"}]
    rows += [{"__key__": "d", "json": "["}]
    write(rows, tmp_path, "x")
    report = check(str(tmp_path), views={"v": ("jsn;json", vector)})
    assert (report.samples, report.ok) == (4, 1)
    assert report.reasons == {"jsn: ValueError": 1, ": Viewless": 1, "json: JSONDecodeError": 1}
    assert [e.reason for e in report.examples if e.key == "b"] == [
        "ValueError: the view holds numbers that are not finite"
    ]


def test_no_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing at"):
        check(str(tmp_path / "none-*.tar"))

"""What is packed is what webdataset reads back, and a user's slip leaves nothing behind."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from mvpretrain.shards.index import Index
from mvpretrain.shards.pack import pack, write, write_splits


def read(*shards: Path) -> list[dict[str, Any]]:
    """Raw samples sorted by key, by a reader that is not ours."""
    found = []
    for shard in shards:
        with shard.open("rb") as file:
            found += group_by_keys(tar_file_expander([{"url": str(shard), "stream": file}]))
    plain = [{k: v for k, v in s.items() if k == "__key__" or not k.startswith("__")} for s in found]
    return sorted((s for s in plain if s), key=lambda s: s["__key__"])


def folder(at: Path, count: int = 10) -> Path:
    for i in range(count):
        (at / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        stem = at / "ab"[i % 2] / f"{i:03d}"
        stem.with_suffix(".jpg").write_bytes(bytes([i]) * (i + 1))
        stem.with_suffix(".fou.npy").write_bytes(b"f" * i)
        if i != 3:
            stem.with_suffix(".TXT").write_text(f"größe {i}", encoding="utf-8")
    (at / ".hidden.txt").write_text("not a sample")
    return at


def table(at: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as the kind of table that the ending says."""
    if at.suffix == ".jsonl":
        at.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif at.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="parquet tables need pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), at)
    else:
        with at.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if at.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return at


def test_folder(tmp_path: Path) -> None:
    written = pack(folder(tmp_path / "in"), tmp_path / "out", shard_samples=4)
    assert written.samples == 10 and written.fields == {"jpg": 10, "txt": 9, "fou.npy": 10}
    assert written.bytes == sum(s.stat().st_size for s in written.shards)
    expected = [
        {"__key__": f"{'ab'[i % 2]}_{i:03d}", "jpg": bytes([i]) * (i + 1), "fou.npy": b"f" * i}
        | ({"txt": f"größe {i}".encode()} if i != 3 else {})
        for i in range(10)
    ]
    assert read(*written.shards) == sorted(expected, key=lambda s: s["__key__"])
    assert [s.nsamples for s in Index.load(tmp_path / "out/index.json").shards] == [4, 4, 2]
    assert [p.name for p in tmp_path.iterdir()].count("out") == 1 and len(list(tmp_path.iterdir())) == 2


def test_the_order_is_shuffled_once_by_the_seed(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 40)

    def packed(out: str, seed: int | None) -> Path:
        return pack(source, tmp_path / out, seed=seed, fields=["jpg"]).shards[0]

    def order(shard: Path) -> list[str]:
        with tarfile.open(shard) as tar:
            return tar.getnames()

    kept, first, again, other = packed("kept", None), packed("first", 0), packed("again", 0), packed("other", 1)
    assert order(kept) == sorted(order(first)) != order(first) != order(other)
    assert first.read_bytes() == again.read_bytes()


def test_label_folders(tmp_path: Path) -> None:
    written = pack(folder(tmp_path / "in"), tmp_path / "out", label_folders=True)
    assert {s["__key__"][0]: s["cls"] for s in read(*written.shards)} == {"a": b"0", "b": b"1"}
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b"]
    given = pack(tmp_path / "in", tmp_path / "given", label_folders=["b", "c", "a"])
    assert {s["__key__"][0]: s["cls"] for s in read(*given.shards)} == {"a": b"2", "b": b"0"}
    with pytest.raises(ValueError, match=r"class folder 'b'.*known: a, c"):
        pack(tmp_path / "in", tmp_path / "refused", label_folders=["a", "c"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_hold_the_same_samples(tmp_path: Path, kind: str) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / f"photos/{i}.png").write_bytes(b"png%d" % i)
        (tmp_path / f"{i}.wav").write_bytes(b"wav%d" % i)
    rows = [
        {"id": f"s.{i}", "image": f"photos/{i}.png", "ear:left.wav": f"{i}.wav", "txt": f'"{i}", two', "cls": str(i)}
        for i in range(3)
    ]
    rows[1]["txt"] = ""
    found = read(*pack(table(tmp_path / f"t.{kind}", rows), tmp_path / "out").shards)
    assert [s["__key__"] for s in found] == ["s_0", "s_1", "s_2"]
    assert found[2] == {"__key__": "s_2", "png": b"png2", "left.wav": b"wav2", "txt": b'"2", two', "cls": b"2"}
    assert "txt" not in found[1]


def test_columns_can_be_chosen_and_named(tmp_path: Path) -> None:
    rows = [{"caption": "one", "features": [1, 2.5], "info": {"a": 1}, "other": "x"}]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(rows[0]))
    (found,) = read(*pack(path, tmp_path / "out", fields=["caption:txt", "features:fou.npy", "info:json"]).shards)
    assert found["txt"] == b"one" and json.loads(found["json"]) == {"a": 1} and found["__key__"] == "00000000"
    np.testing.assert_array_equal(np.load(BytesIO(found["fou.npy"])), np.array([1, 2.5], np.float32))
    with pytest.raises(ValueError, match=r"unknown column in 't.jsonl' 'captoin'; did you mean 'caption'"):
        pack(path, tmp_path / "refused", fields=["captoin:txt"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"jpg": "a.jpg"}, {"jpg": "b.jpg"}], r"row 2, column 'jpg': no file 'b.jpg' in .*mend the path"),
        ([{"photo": "b.jpg"}], r"row 1, column 'photo': no file 'b.jpg'"),
        ([{"note": "gone.md"}, {"note": "here.md"}], r"row 1, column 'note': no file 'gone.md'"),
        ([{"id": "a/b", "txt": "x"}, {"id": "a.b", "txt": "y"}], r"key 'a_b' comes twice, from 'row 1' and 'row 2'"),
        ([{"id": "", "txt": "x"}], r"row 1 of 't.csv' has an empty 'id'"),
        ([{"id": "a", "txt": ""}], r"row 1 of 't.csv' has no value"),
        ([{"one": "a.jpg", "two": "a.jpg"}], r"column 'two': the sample has a field 'jpg' already; .*'two:left.jpg'"),
        ([{"a caption": "x"}], r"'a caption' cannot name a field; select it as 'column:field'"),
        ([{"txt": "x", "cls": "cat"}], r"field 'cls' cannot hold 'cat'"),
    ],
)
def test_bad_tables_are_refused_and_leave_nothing(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"jpg")
    (tmp_path / "here.md").write_bytes(b"md")
    before = sorted([*tmp_path.iterdir(), table(tmp_path / "t.csv", rows)])
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "t.csv", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\n1\n", r"row 1 of 't.csv' has 1 cells, the header 2"),
        ("t.csv", "a,a\n1,2\n", r"names a column twice"),
        ("t.csv", "a,b\n", r"no samples in .*t.csv"),
        ("t.jsonl", '{"txt": "x"}\n{"txt"', r"row 2 of 't.jsonl' is no JSON"),
        ("t.jsonl", "[1]", r"row 1 of 't.jsonl' is a list, an object is needed"),
        ("t.xlsx", "", r"unknown ending of a table 'xlsx'.*csv, tsv, jsonl, parquet"),
    ],
)
def test_unreadable_tables_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / name, tmp_path / "out")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    with pytest.raises(ValueError, match=r"no samples in .*files that end in flac"):
        pack(source, tmp_path / "out", fields=["flac"])
    with pytest.raises(ValueError, match=r"neither a folder nor a table"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (source / "a/2024.01.07.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'a/2024.01.07.jpg' would be the field '01.07.jpg'.*rename"):
        pack(source, tmp_path / "out")
    (source / "a/2024.01.07.jpg").rename(source / "a/000.JPG")
    with pytest.raises(ValueError, match=r"'000.JPG' are one field of one sample|'000.jpg' are one field"):
        pack(source, tmp_path / "out")


def test_an_existing_folder_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pack(folder(tmp_path / "in"), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"out' exists and is not an empty folder; give another"):
        pack(tmp_path / "in", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[dict[str, Any]]:
        yield {"__key__": "a", "txt": "x"}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_splits(tmp_path / "out", {"train": samples()})
    assert list(tmp_path.iterdir()) == []


def test_write_encodes_by_ending_and_closes_shards_in_time(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"s-{i}", "bin": b"x" * 3000, "a.npy": np.arange(i), "json": {"ü": [i]}, "cls": np.int64(i)}
        for i in range(7)
    ]
    samples[6]["bin"] = b"x" * 50_000  # larger than a shard may be: it stands alone
    written = write(samples, tmp_path, "x", shard_bytes=25_000)
    assert [p.name for p in written.shards] == [f"x-{i:06d}.tar" for i in range(len(written.shards))]
    assert all(10_240 < p.stat().st_size <= 25_000 for p in written.shards[:-1])
    found = read(*written.shards)
    assert json.loads(found[5]["json"]) == {"ü": [5]} and found[5]["cls"] == b"5" and len(read(written.shards[-1])) == 1
    np.testing.assert_array_equal(np.load(BytesIO(found[5]["a.npy"])), np.arange(5))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "a.b", "txt": "x"}, r"key 'a.b' holds more than letters"),
        ({"__key__": "b"}, r"sample 'b' has no field"),
        ({"__key__": "b", "png": "text"}, r"field 'png' cannot hold a str; give its bytes"),
        ({"__key__": "b", "npy": np.array([None])}, r"field 'npy' cannot hold array"),
        ({"__key__": "b", "npy": [[1], [1, 2]]}, r"field 'npy' cannot hold \[\[1\], \[1, 2\]\]"),
        ({"__key__": "a", "txt": "x"}, r"key 'a' comes twice"),
    ],
)
def test_write_refuses(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write([{"__key__": "a", "txt": "x"}, sample], tmp_path, "x")

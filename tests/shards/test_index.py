from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from mvpretrain import files
from mvpretrain.shards import index as index_module
from mvpretrain.shards.headers import key_and_field, number
from mvpretrain.shards.index import HEAD, ID, SHARD, Index
from mvpretrain.shards.urls import expand
from tests.shards.samples import plain, samples_of, write_shards


def contents(index: Index) -> list[dict[str, bytes]]:
    """Every sample as the member table describes it."""
    found = []
    for row in index.table:
        tar = Path(index.shards[row[SHARD]].url).read_bytes()
        places = {f: row[index.offset(f) : index.offset(f) + 2] for f in index.fields}
        found.append({f: tar[at : at + size] for f, (at, size) in places.items() if at >= 0})
    return found


LONG = "d" * 60 + "/" + "e" * 70 + "/" + "f" * 80  # 212 characters: beyond ustar's name field, within its prefix
NAMES = [
    "a.jpg",
    "a.txt",
    f"{LONG}.jpg",
    f"{LONG}.seg.TXT",
    "b/ü.jpg",
    "b/c.d/e.jpg",
    "b/c.d/e.txt",
    "noending",
    "z.jpg",
]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_agree_with_tarfile_and_webdataset(tmp_path: Path, kind: int) -> None:
    path, long = tmp_path / "s.tar", kind != tarfile.USTAR_FORMAT
    with tarfile.open(path, "w", format=kind, pax_headers={"comment": "for all"}) as tar:
        for k, name in enumerate(NAMES + [f"{'x' * 300}.jpg"] * long):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = k * 300, 1.5 if kind == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([k]) * info.size))
            folder = tarfile.TarInfo(f"folder{k}.jpg")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(f"link{k}.jpg")
            link.type, link.linkname, link.size = tarfile.SYMTYPE, "a.jpg" * (1 + 30 * long), 700
            tar.addfile(link)
    index = Index.scan(str(path))
    with path.open("rb") as file:
        expected = list(group_by_keys({**found, "__url__": ""} for found in tar_file_iterator(file)))  # type: ignore[arg-type]
    assert contents(index) == [{k: v for k, v in s.items() if not k.startswith("__")} for s in expected]
    assert index.fields == ["jpg", "seg.txt", "txt"] and not index.problems
    with tarfile.open(path) as tar:
        offsets = {m.name: m.offset_data for m in tar if m.isreg()}
    assert index.table[1, index.offset("jpg")] == offsets[f"{LONG}.jpg"]


def test_names_are_cut_as_webdataset_cuts_them() -> None:
    for name in ["a.jpg", "a/b.c/d.e.f", "./a.jpg", "a.b/c", "c", ".hidden", "x__y.jpg"]:
        key, field = base_plus_ext(name)
        assert key_and_field(name.encode()) == ((key or "").encode(), (field or "").encode()), name
    for skipped in ["__meta__", "__meta__/a.jpg", "a/.hidden.jpg", "a/._b.jpg"]:
        assert key_and_field(skipped.encode()) == (b"", b"")


def test_sizes_beyond_octal() -> None:
    assert number(b"00000001750\0", 0) == 1000
    assert number(b"\x80" + (9 << 30).to_bytes(11, "big"), 0) == 9 << 30


def cut_at(path: str, byte: int) -> Index:
    Path(path).write_bytes(Path(path).read_bytes()[:byte])
    return Index.scan(path)


def test_a_truncated_tar_gives_its_whole_samples(tmp_path: Path) -> None:
    samples = samples_of(9)
    (whole,) = write_shards(tmp_path, samples)
    index = Index.scan(whole)
    head, body, size = index.table[6, [HEAD, index.offset("bin"), index.offset("bin") + 1]]
    cuts = {"member": body + size // 2, "header": head + 300, "at a border": head, "second": body + size + 1024}
    for name, byte in cuts.items():
        (path,) = write_shards(tmp_path / name, samples)
        index = cut_at(path, int(byte))
        # Before a bare border, nothing tells whether sample 5 had more members.
        assert contents(index) == plain(samples[:6] if name in ("member", "second") else samples[:5]), name
        assert [p.url for p in index.problems] == [path], name
    assert "cut inside 's00006.bin'" in str(Index.scan(str(tmp_path / "member")).problems[0])


def test_zeros_in_the_middle_are_reported(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [{"__key__": f"k{i}", "bin": bytes([7]) * 50_000} for i in range(5)])
    tar = bytearray(Path(path).read_bytes())
    tar[300 * 512 :] = bytes(len(tar) - 300 * 512)  # a download that stopped in a file of full length
    Path(path).write_bytes(tar)
    index = Index.scan(path)
    assert len(index) == 2 and "end-of-archive mark" in index.problems[0].reason


def test_files_that_are_no_tars_are_named(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, samples_of(3))
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(path, "a.jpg")
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    for name, reason in {"z": "gzip", "text": "not a tar", "empty": "not a tar", "none": "no samples"}.items():
        with pytest.raises(ValueError, match=rf"{name}.tar.*{reason}|{reason}.*{name}.tar"):
            Index.scan(str(tmp_path / f"{name}.tar"))


def test_keys_with_dots_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [{"__key__": f"a.{i}", "jpg": b""} for i in range(300)])
    with pytest.raises(ValueError, match=r"more than 256 fields .*s-0000.tar.*, such as 0\.jpg, 1\.jpg"):
        Index.scan(path)


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "a", samples_of(4), 4) + write_shards(tmp_path / "b", samples_of(2), 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_here", "b")
    assert expand("a/s-{0000..0003}.tar::${here}/*.tar") == paths
    assert expand(["a", f"file:{paths[4]}", "b/s-0001.tar"]) == paths
    assert expand(["pipe:cat {x,y}.tar", "s3://b/0.tar"]) == ["pipe:cat x.tar", "pipe:cat y.tar", "s3://b/0.tar"]
    for bad, message in {
        "a/s-{0003..0006}.tar": r"s-0004.tar' and 2 more of 4.*shards pack",
        "c/*.tar": r"nothing at 'c/\*.tar'",
        "${nowhere}/s.tar": "nowhere",
        "a::a/s-0000.tar": "listed twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            expand(bad)


def test_shards_with_other_fields_make_one_index(tmp_path: Path) -> None:
    first, second = samples_of(5), [{"__key__": f"z{i}", "wav": b"w" * i, "bin": b"b"} for i in range(4)]
    paths = write_shards(tmp_path, first, 2) + write_shards(tmp_path, second, 1, "t")
    index = Index.scan(paths)
    assert contents(index) == plain(first) + plain(second)
    assert [s.fields for s in index.shards] == [
        {"bin": 2, "cls": 2, "txt": 1},
        {"bin": 3, "cls": 3, "txt": 1},
        {"bin": 4, "wav": 4},
    ]
    assert contents(index.pick([2, 0])) == plain(second) + plain(first[:2])


def test_a_written_index_reads_back_moves_and_is_mapped(tmp_path: Path) -> None:
    index = Index.scan(write_shards(tmp_path / "a", samples_of(9), 3))
    index.save(tmp_path / "a" / "index.json")
    written = json.loads((tmp_path / "a" / "index.json").read_text())
    assert written["__kind__"] == "wids-shard-index-v1" and written["wids_version"] == 1
    assert written["shardlist"][0].items() >= {"url": "s-0000.tar", "nsamples": 3}.items()
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = Index.load(tmp_path / "b" / "index.json")
    assert (found.table == index.table).all() and found.fields == index.fields and found.unique
    assert [s[1:] for s in found.shards] == [s[1:] for s in index.shards]
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again.table, np.memmap) and (again.table == index.table).all()
    assert len(pickle.dumps(found)) < 2000


def test_stale_and_foreign_indices_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, samples_of(9), 3)
    file = tmp_path / "index.json"
    Index.scan(paths).save(file)
    write_shards(tmp_path, samples_of(90), 3)
    with pytest.raises(ValueError, match=r"s-0000.tar' had 20,480 bytes and has .* `mvpretrain shards index`"):
        Index.load(file)
    assert len(Index.find(paths)) == 90
    Path(paths[0]).unlink()
    with pytest.raises(ValueError, match=r"s-0000.tar' .* is not there"):
        Index.load(file)
    (tmp_path / "other.json").write_text('{"shards": []}')
    for name in ("other", "none"):
        with pytest.raises(ValueError, match=f"{name}.json' is no shard index"):
            Index.load(tmp_path / f"{name}.json")


def test_an_index_of_another_format_is_read_from_the_tars_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path, samples_of(9), 3)
    Index.scan(paths).save(tmp_path / "index.json")
    monkeypatch.setitem(files.FORMATS, "index", 2)
    for urls in (paths, str(tmp_path / "index.json")):
        with pytest.warns(UserWarning, match=r"index\.json' is of index format 1, .* its shards are read anew"):
            assert contents(Index.find(urls)) == plain(samples_of(9))


def test_an_index_of_wids_is_completed(tmp_path: Path) -> None:
    write_shards(tmp_path, samples_of(6), 2)
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1}
    content["shardlist"] = [{"url": f"s-000{k}.tar", "nsamples": 3} for k in range(2)]
    (tmp_path / "wids.json").write_text(json.dumps(content))
    assert contents(Index.find(str(tmp_path / "wids.json"))) == plain(samples_of(6))


def test_the_index_beside_the_shards_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "a", samples_of(9), 3)
    others = write_shards(tmp_path / "b", samples_of(4, 50), 2)
    index = Index.scan(paths)
    index.save(tmp_path / "a" / "index.json")
    read: list[str] = []
    scan_shard = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda url, *how: read.append(url) or scan_shard(url, *how))
    assert isinstance(Index.find(str(tmp_path / "a")).table, np.memmap) and not read
    assert contents(Index.find(paths[1:])) == plain(samples_of(9)[3:]) and not read
    assert (Index.find([*paths, *others]).table[:9, ID] == index.table[:, ID]).all() and read == others

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from mvpretrain.data.sources import shards as tars_module
from mvpretrain.data.sources.shards import ShardsConfig, Tars, Weighted
from mvpretrain.shards import urls as urls_module
from mvpretrain.shards.index import Index
from mvpretrain.types import BadSample
from mvpretrain.views import ViewConfig
from tests.shards.samples import plain, samples_of, write_shards

VIEWS = {"image": ("bin", "some"), "text": ("txt", "any")}


def build(train: Any, views: dict[str, tuple[str, str]] = VIEWS, **settings: Any) -> list[Tars]:
    """The sources for views of (field, missing)."""
    read = {v: ViewConfig.model_validate({"kind": "x", "field": f, "missing": m}) for v, (f, m) in views.items()}
    return ShardsConfig(train=train, **settings).build(read, train=True)


def test_reads_every_sample_in_any_order(tmp_path: Path) -> None:
    samples = samples_of(20)
    tars = Tars(Index.scan(write_shards(tmp_path, samples, 3)), label="cls")
    for i in [7, 0, 19, 7, 3]:
        found = tars.read(i)
        assert (found.key, found.fields, found.label) == (samples[i]["__key__"], plain(samples)[i], i % 7)
        assert found.id == tars.ids[i] and Path(tars.url(i)).name == f"s-000{[0, 1, 2][i * 3 // 20]}.tar"
    assert tars.counts.tolist() == [6, 7, 7]


def test_only_the_views_fields_and_the_label_are_read(tmp_path: Path) -> None:
    (tars,) = build(write_shards(tmp_path, samples_of(4)), {"text": ("png;txt", "some")}, label="cls")
    assert sorted(tars.read(3).fields) == ["cls", "txt"] and tars.read(3).label == 3


def test_travels_to_another_process_with_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars_module, "OPEN_FILES", 2)
    paths = write_shards(tmp_path, samples_of(12), 6)
    (tars,) = build(paths, ids="shard")
    first = [tars.read(i) for i in (0, 11, 3, 5, 0)]
    assert len(tars.files.descriptors) == 2
    again = pickle.loads(pickle.dumps(tars))
    assert not again.files.descriptors and [again.read(i) for i in (0, 11, 3, 5, 0)] == first


def test_labels(tmp_path: Path) -> None:
    rows = [b'{"class": 5}', b"{}", b'{"class": "dog"}', b"{", b"[1]"]
    paths = write_shards(tmp_path, [{"__key__": f"k{i}", "json": row, "bin": b""} for i, row in enumerate(rows)])
    paths += write_shards(tmp_path, [{"__key__": "unlabelled", "bin": b""}], 1, "t")
    (tars,) = build(paths, {"x": ("bin", "some")}, label="json:class")
    assert [tars.read(i).label for i in (0, 1, 5)] == [5, -1, -1]
    for i in range(2, 5):
        with pytest.raises(BadSample, match=r"label json: \w+Error"):
            tars.read(i)
    with pytest.raises(ValueError, match=r"label is read from 'cls', which no sample .* are bin, json"):
        build(paths, {"x": ("bin", "some")}, label="cls")


def test_ids_are_stable_and_repeated_keys_are_refused(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", samples_of(10), 1)
    three = write_shards(tmp_path / "three", samples_of(10), 3)
    assert build(one)[0].ids.tolist() == build(three)[0].ids.tolist()
    with pytest.raises(ValueError, match=r"10 keys .*'s0000\d' in .*three/.* and in .*one/.*'key'.*'shard'"):
        build([*three, *one])
    with pytest.raises(ValueError, match="10 keys"):
        build([Weighted(urls=one[0], weight=1), Weighted(urls=tuple(three), weight=2)])
    assert sorted(build([*one, *three], ids="key")[0].ids.tolist()) == sorted(build(one)[0].ids.tolist() * 2)
    assert len(set(build([*one, *three], ids="shard")[0].ids.tolist())) == 20


def test_members_that_are_not_neighbours_are_refused(tmp_path: Path) -> None:
    rows = [{"__key__": "a", "bin": b""}, {"__key__": "b", "bin": b""}, {"__key__": "a", "txt": b""}]
    with pytest.raises(ValueError, match=r"1 keys .*'a' twice in .*s-0000.tar.*neighbours"):
        build(write_shards(tmp_path, rows))
    index = Index.scan(str(tmp_path))
    index.save(tmp_path / "index.json")
    with pytest.raises(ValueError, match="1 keys"):
        build(str(tmp_path / "index.json"))


def test_a_field_that_is_nowhere_or_missing_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, samples_of(9), 3)
    paths += write_shards(tmp_path, [{"__key__": "k", "bin": b"1"}], 1, "t")
    for missing in ("some", "any", "none", "drop"):
        with pytest.raises(ValueError, match=r"view 'sound' reads the field 'wav', .* bin, cls, txt"):
            build(paths, {"sound": ("wav", missing)})
    with pytest.raises(ValueError, match=r"shard .*t-0000.tar' has 'png;txt'.* views.text.missing to any"):
        build(paths, {"text": ("png;txt", "some")})
    with pytest.raises(ValueError, match=r"6 samples lack 'txt', .* first is 's00000' in .*s-0000.tar"):
        build(paths, {"text": ("txt", "none")})
    with pytest.raises(ValueError, match="'bin;txt'"):
        build(paths, {"text": ("bin; .TXT", "any")})
    build(paths, {"text": ("txt", "any"), "either": ("txt;bin", "none")})


def test_drop_leaves_samples_out(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, samples_of(9), 3)
    paths += write_shards(tmp_path, [{"__key__": "k", "bin": b"1"}], 1, "t")
    (tars,) = build(paths, {"image": ("bin", "some"), "text": ("txt", "drop")})
    assert tars.counts.tolist() == [1, 2, 1, 0] and len(tars.ids) == 4
    assert [tars.read(i).key for i in range(4)] == ["s00001", "s00003", "s00005", "s00007"]
    rows = [{"__key__": "a", "bin": b""}, {"__key__": "b", "txt": b""}]
    with pytest.raises(ValueError, match=r"no sample .* has all views of missing=drop"):
        build(write_shards(tmp_path, rows, 1, "u"), {"image": ("bin", "drop"), "text": ("txt", "drop")})


def test_a_view_may_be_in_one_of_two_sources(tmp_path: Path) -> None:
    one = Weighted(urls=tuple(write_shards(tmp_path, samples_of(4), 1, "a")), weight=3, name="one")
    two = Weighted(urls=tuple(write_shards(tmp_path, [{"__key__": "k", "bin": b"1"}], 1, "b")), weight=1)
    found = build([one, two])
    assert [(t.weight, len(t.ids)) for t in found] == [(3, 4), (1, 1)] and found[0].name == "one"
    with pytest.raises(ValueError, match=r"'txt', which no sample of .*b-0000.tar"):
        build([one, two], {"text": ("txt", "some")})


def test_a_shard_that_shrinks_gives_bad_samples(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, samples_of(9))
    (tars,) = build(path)
    Path(path).write_bytes(Path(path).read_bytes()[:5000])
    assert tars.read(0).key == "s00000"
    with pytest.raises(BadSample, match=r"truncated .*s-0000.tar"):
        tars.read(8)
    (tars,) = build(write_shards(tmp_path, samples_of(9)))
    Path(path).unlink()
    with pytest.raises(BadSample, match="FileNotFoundError"):
        tars.read(0)


def test_remote_shards_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls_module, "PAUSE", 0.0)
    (path,) = write_shards(tmp_path / "far", samples_of(9))
    url, cache = f"pipe:cat {path}", tmp_path / "cache"
    with pytest.raises(ValueError, match=r"pipe:cat .* is remote; set data.cache"):
        build(url)
    (tars,) = build(url, cache=cache)
    Path(path).rename(tmp_path / "gone.tar")
    assert [tars.read(i).fields for i in range(9)] == [
        {k: v for k, v in s.items() if k != "cls"} for s in plain(samples_of(9))
    ]
    assert len(list(cache.glob("*.tar"))) == 1 and not list(cache.glob("*.partial"))
    with pytest.raises(ValueError, match=r"pipe:false .*cannot be fetched"):
        build("pipe:false x", cache=cache)
    assert len(list(cache.glob("*.tar"))) == 1 and not list(cache.glob("*.partial"))
    next(iter(cache.glob("*.tar"))).write_bytes(b"")
    with pytest.raises(ValueError, match=r"has 0 bytes, its index says .*remove"):
        Tars(tars.index, cache=cache).read(0)


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"'a.tar' a weight too"):
        ShardsConfig(train=("a.tar", Weighted(urls="b.tar", weight=1)))
    with pytest.raises(ValueError, match="greater than 0"):
        Weighted(urls="b.tar", weight=0)
    with pytest.raises(ValueError, match="at least one url"):
        ShardsConfig(train=())
    assert ShardsConfig(train="a.tar").build({}, train=False) == []

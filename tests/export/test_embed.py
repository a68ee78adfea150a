"""Shards embedded in bulk, against `load().embed` sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvpretrain.export.embed import embed
from mvpretrain.export.encoder import Exported, load
from mvpretrain.export.write import export_run
from mvpretrain.shards.index import Index
from tests.runs import make_run, make_shards

FIELDS = {"left": "left.npy", "right": "right.npy", "text": "txt"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """(folder of the export, url of shards, their samples in order)."""
    folder = tmp_path_factory.mktemp("embed")
    made = make_shards(folder)
    out = export_run(make_run(folder), folder / "out")
    return out, str(folder / "data/train-000000.tar"), made["train"]


def one_by_one(exported: Exported, made: list[dict], field: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows with zeros where absent, present): a sample with any unreadable view is absent in all."""
    rows, present = [], []
    for sample in made:
        there = field in sample and not isinstance(sample["left.npy"], bytes)
        present.append(there)
        rows.append(exported.embed([sample[field]])[0].numpy() if there else np.zeros(exported.dim, np.float32))
    return np.array(rows), np.array(present)


@pytest.mark.parametrize(("batch", "workers"), [(7, 0), (60, 0), (1, 2)])
def test_arrays_hold_every_sample_in_order(place, tmp_path, capsys, batch, workers):
    exported, url, made = place
    done = embed(exported, url, tmp_path / "out", batch=batch, workers=workers)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["ids.npy", "keys.txt", *(f"{v}.npy" for v in FIELDS), *(f"present_{v}.npy" for v in FIELDS)]
    )
    assert (out / "keys.txt").read_text().splitlines() == [s["__key__"] for s in made]
    assert np.array_equal(np.load(out / "ids.npy"), Index.find(url).table[:, 1])
    for view, field in FIELDS.items():
        rows, present = one_by_one(load(exported, view), made, field)
        found = np.load(out / f"{view}.npy")
        assert found.dtype == np.float32 and found.shape == (60, 5)
        assert np.array_equal(np.load(out / f"present_{view}.npy"), present)
        np.testing.assert_allclose(found, rows, atol=1e-6)
    assert done.samples == 60 and sum(done.bad.values()) == 1 and "left: ValueError" in next(iter(done.bad))
    said = capsys.readouterr().out
    assert "60 samples embedded as left, right, text" in said and "1 of them could not be used" in said


def test_limit_and_views(place, tmp_path):
    exported, url, made = place
    done = embed(exported, [url], tmp_path / "out", views=["text"], batch=4, limit=10, workers=0)
    assert done == (10, {})
    rows, present = one_by_one(load(exported, "text"), [{**s, "left.npy": None} for s in made[:10]], "txt")
    np.testing.assert_allclose(np.load(tmp_path / "out/text.npy"), rows, atol=1e-6)
    assert np.array_equal(np.load(tmp_path / "out/present_text.npy"), present)
    assert (tmp_path / "out/keys.txt").read_text().splitlines() == [s["__key__"] for s in made[:10]]
    assert not (tmp_path / "out/left.npy").exists()


def test_parquet_has_the_same_rows(place, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    exported, url, made = place
    embed(exported, url, tmp_path / "out", workers=0)
    embed(exported, url, tmp_path / "table.parquet", batch=16, workers=0)
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names == ["key", "id", "left", "right", "text"]
    assert table["key"].to_pylist() == [s["__key__"] for s in made]
    assert table["id"].to_pylist() == np.load(tmp_path / "out/ids.npy").tolist()
    for view in FIELDS:
        rows, present = np.load(tmp_path / f"out/{view}.npy"), np.load(tmp_path / f"out/present_{view}.npy")
        for found, row, there in zip(table[view].to_pylist(), rows, present):
            assert (found is not None) == there
            if there:
                np.testing.assert_allclose(found, row, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "table.parquet"]


@pytest.mark.parametrize("name", ["out", "table.parquet"])
def test_interrupted_run_leaves_nothing(place, tmp_path, monkeypatch, name):
    exported, url, _ = place
    calls = []

    def fails(self, view):
        calls.append(view)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return torch.zeros(len(view.data), 5)

    monkeypatch.setattr(Exported, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed(exported, url, tmp_path / name, views=["left"], batch=8, workers=0)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_refused(place, tmp_path):
    exported, url, _ = place
    with pytest.raises(ValueError, match="unknown view 'txt'; did you mean 'text'"):
        embed(exported, url, tmp_path / "out", views=["txt"])
    with pytest.raises(ValueError, match="batch=8 limit=0"):
        embed(exported, url, tmp_path / "out", batch=8, limit=0)
    with pytest.raises(ValueError, match="nothing-"):
        embed(exported, str(tmp_path / "nothing-{0..1}.tar"), tmp_path / "out")
    with pytest.raises(ValueError, match="is no export"):
        embed(tmp_path, url, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists; give another path"):
        embed(exported, url, tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]

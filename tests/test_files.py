"""Files and folders appear whole or not at all; formats of other versions are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mvpretrain import files


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk full"), files.whole_file(path) as part:
        part.write_text("ha")
        assert path.read_text() == "old"
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "above/out"
    with pytest.raises(RuntimeError, match="disk full"), files.fresh_folder(out) as part:
        (part / "inner").mkdir()
        assert not out.exists()
        raise RuntimeError("disk full")
    assert not os.listdir(tmp_path / "above")
    out.mkdir()  # empty: nothing is lost
    with files.fresh_folder(out) as part:
        (part / "a.txt").write_text("a")
    assert os.listdir(tmp_path / "above") == ["out"] and os.listdir(out) == ["a.txt"]
    with pytest.raises(ValueError, match="exists and is not an empty folder"), files.fresh_folder(out):
        pass


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, synced = tmp_path / "final", []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, final.exists())))
    part = tmp_path / "part"
    (part / "inner").mkdir(parents=True)
    (part / "inner/a").touch()
    files.move_into_place(part, final)
    *before, last = synced
    assert sorted(before) == [("a", False), ("inner", False), ("part", False)] and last == (tmp_path.name, True)
    again = tmp_path / "again"
    again.mkdir()
    files.move_into_place(again, final)
    assert not os.listdir(final)


def test_formats_of_other_versions_are_refused_with_the_one_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files.FORMATS, "index", 3)
    monkeypatch.setitem(files.READERS, ("index", 1), "version 0.1")
    files.check_format("index", 3, Path("here"))
    with pytest.raises(ValueError, match=r"'here' is of index format 1, this version reads 3; version 0\.1 of mvp"):
        files.check_format("index", None, Path("here"))
    with pytest.raises(ValueError, match="format 4, this version reads 3; a later version of mvpretrain reads it"):
        files.check_format("index", 4, Path("here"))

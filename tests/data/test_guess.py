"""What is guessed of shards: views by ending and by content, statistics, what is no view, and what is held out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvpretrain.data.guess import Guess, guess, spelled
from mvpretrain.shards.pack import write


def picture(side: int, colours: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side + 3, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels if colours == 3 else pixels[..., 0]).save(stream, kind)
    return stream.getvalue()


def array(x: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(x))
    return stream.getvalue()


def guessed(folder: Path, samples: int, fields: Mapping[str, Any], **limits: Any) -> Guess:
    """The guess for shards whose sample i has `value(i)` of each field, where that is not None."""
    made = [{name: value(i) for name, value in fields.items()} for i in range(samples)]
    kept = [{k: v for k, v in sample.items() if v is not None} for sample in made]
    write([{"__key__": f"k{i}"} | sample for i, sample in enumerate(kept)], folder, "s", **limits)
    return guess(str(folder / "s-*.tar"))


def test_views_by_ending_and_statistics(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wide = random.normal([5, -2, 100], [1, 1, 9], (40, 3))
    even = random.normal(3, 2, (40, 6)).astype(np.float32)
    found = guessed(
        tmp_path,
        40,
        {
            "jpg": lambda i: picture(20, 3, "JPEG") if i % 2 else None,
            "png": lambda i: None if i % 2 else picture(24, 3),
            "txt": lambda i: "x" * (10 + i % 5),
            "lines.txt": lambda i: "one\ntwo",
            "json": lambda i: {"caption": "a cat", "license": "none", "n": 3},
            "wide.npy": lambda i: array(wide[i]),
            "even.npy": lambda i: array(even[i].reshape(2, 3)),
            "ecg.npy": lambda i: array(np.full((2, 300 + i), i, np.float32)),
            "time.npy": lambda i: array(np.zeros((64, 4), np.int16)),
            "cls": lambda i: i % 3,
        },
    )
    views = {view.name: view for view in found.views}
    settings = {name: view.settings for name, view in views.items()}
    assert found.label == "cls" and found.others == {} and found.ids == "unique"
    assert set(views) == {"image", "text", "lines", "caption", "wide", "even", "ecg", "time"}
    assert set(settings["image"]["field"].split(";")) == {"jpg", "png"} and settings["image"]["channels"] == 3
    assert settings["image"]["size"] == 22 and views["image"].measured == "colour, shorter side 20 to 24 pixels"
    assert views["image"].samples == 40 and 0.4 < settings["image"]["normalize"]["mean"][0] < 0.6
    assert (settings["caption"]["key"], settings["caption"]["field"]) == ("caption", "json")
    assert settings["text"]["length"] == 16  # 14 bytes, begin and end
    assert settings["lines"]["lines"] is True
    assert settings["wide"]["mean"] == pytest.approx(wide.mean(axis=0), rel=1e-3)
    assert settings["wide"]["std"] == pytest.approx(wide.std(axis=0), rel=1e-3)
    assert (settings["even"]["dim"], settings["even"]["mean"]) == (6, pytest.approx(even.mean(), rel=1e-3))
    assert settings["even"]["std"] == pytest.approx(even.std(), rel=1e-3) and views["even"].encoder["input"] == 6
    assert (settings["ecg"]["channels"], settings["ecg"]["length"]) == (2, 339) and "time_first" not in settings["ecg"]
    assert "2 channels, 300 to 339 steps" in views["ecg"].measured and views["ecg"].encoder["strides"] == [2]
    assert (settings["time"]["channels"], settings["time"]["length"], settings["time"]["time_first"]) == (4, 64, True)


def test_what_is_no_view_says_why_and_content_tells_where_the_ending_does_not(tmp_path: Path) -> None:
    found = guessed(
        tmp_path,
        60,
        {
            "photo": lambda i: picture(16, 1),
            "xyz": lambda i: b"\0\1\2",
            "npy": lambda i: array(np.zeros(3, np.complex64)),
            "maps.npy": lambda i: array(np.zeros((3 + i, 4 + i))),
            "nan.npy": lambda i: array([np.nan, 1]),
            "png": lambda i: b"no picture",
            "rare.npy": lambda i: array([1.0, 2]) if i == 0 else None,
            "meta.json": lambda i: {"a": 1, "b": "x", "c": "y"},
            "half.npy": lambda i: array([i, 2 * i]) if i < 15 else b"broken" if i < 20 else None,
        },
        shard_samples=20,
    )
    why = found.others
    assert [view.settings["field"] for view in found.views] == ["half.npy", "photo"]
    assert found.views[1].settings["channels"] == 1
    assert "5 of 20 do not decode" in found.views[0].measured
    assert found.eval == [], "the first shard alone has half.npy, and the others could not be scored by it"
    assert why["xyz"] == "nothing here reads the ending 'xyz'"
    assert "not real numbers" in why["npy"] and "neither one small shape" in why["maps.npy"]
    assert "do not decode: NaN or infinite" in why["nan.npy"] and "cannot be read as an image" in why["png"]
    assert why["rare.npy"] == "only 1 of 60 samples have it" and "of a, b, c" in why["meta.json"]


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["a-000", "a-001", "a-002"], ["a-{000..001}.tar"], ["a-002.tar"]),
        (["test-0", "train-0", "train-1"], ["train-{0..1}.tar"], ["test-0.tar"]),
        (["x_val", "x_train"], ["x_train.tar"], ["x_val.tar"]),
        (["latest-7", "latest-9", "latest-10"], ["latest-10.tar", "latest-7.tar"], ["latest-9.tar"]),
        (["only-0"], ["only-0.tar"], []),
        (["a-0", "a-1", "a-2-bare"], ["a-0.tar", "a-2-bare.tar"], ["a-1.tar"]),
        (["b-0-bare", "b-1"], ["b-0-bare.tar", "b-1.tar"], []),
        (["train-0", "test-0-bare"], ["train-0.tar"], []),
    ],
)
def test_shards_that_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], train: list[str], held_out: list[str]
) -> None:
    """Those of `bare` lack a field, and could not be scored."""
    monkeypatch.chdir(tmp_path)
    for name in names:
        sample = {"__key__": name, "txt": "a"} | ({} if "bare" in name else {"npy": array([1.0, 2])})
        write([sample], tmp_path, "x")[2][0].rename(tmp_path / f"{name}.tar")
    found = guess("*.tar")
    assert (found.train, found.eval) == (train, held_out)


def test_urls_are_spelled_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    here = [f"{tmp_path}/d/a-{n:03d}.tar" for n in range(8, 12)]
    assert spelled(here) == ["d/a-{008..011}.tar"]
    assert spelled(here[:1]) == ["d/a-008.tar"] and spelled(here[::2]) == ["d/a-008.tar", "d/a-010.tar"]
    assert spelled(["s3://x/a0.tar", "s3://x/a1.tar"]) == ["s3://x/a{0..1}.tar"]


def test_one_view_becomes_two_augmentations_and_text_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = guessed(tmp_path / "a", 4, {"type.npy": lambda i: array([1.0, i])})
    assert [view.name for view in found.views] == ["type_npy_1", "type_npy_2"]  # no module may be called `type`
    assert {view.settings["tower"] for view in found.views} == {"type_npy"}
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="two views are needed, and the fields are txt: text; cls: a class; pack"):
        guessed(tmp_path / "b", 4, {"txt": lambda i: "a", "cls": lambda i: i})

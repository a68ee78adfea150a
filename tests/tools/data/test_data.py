"""The tools that make shards, on the real data where it lies beside the repository, else on a few made-up files."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvpretrain.data.sources.shards import Tars
from mvpretrain.shards.check import check
from mvpretrain.shards.index import Index

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared/data"


def data(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the data set {name} is not beside the repository")
    return DATA / name


def read(out: Path, split: str) -> dict[str, dict[str, bytes]]:
    """{key: raw fields} of a split, in shard order."""
    tars = Tars(Index.find(f"{out}/{split}-*.tar"))
    return {sample.key: sample.fields for sample in (tars.read(i) for i in range(len(tars.index)))}


def sound(out: Path) -> bool:
    report = check(str(out))
    assert report.good and not report.missing, report
    return True


def test_digits(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = tool("data.digits")
    make.main([str(tmp_path / "out")])
    assert "train: 1,438 samples in 5 shards" in capsys.readouterr().out and sound(tmp_path / "out")
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    assert len(train) + len(test) == 1797 and not train.keys() & test.keys()
    assert Counter(s["cls"] for s in test.values()).most_common()[-1][1] >= 34  # 174 to 183 scans a class, a fifth
    assert len({s["cls"] for s in list(train.values())[:30]}) > 5  # not sorted by class
    fields = (train | test)["digit-00017"]
    scan = np.asarray(Image.open(io.BytesIO(fields["png"])))
    expected = make.load_digits().images[17]
    np.testing.assert_allclose(scan / 255 * 16, expected, atol=0.04)
    magnitudes = np.load(io.BytesIO(fields["npy"]))
    assert magnitudes.dtype == np.float32 and magnitudes.shape == (8, 8)
    assert magnitudes[4, 4] == pytest.approx(np.log1p(expected.sum()), rel=1e-6)


def test_captions_of_digits_name_the_digit_in_several_languages(tool: Any) -> None:
    make, rng = tool("data.digits"), np.random.default_rng(0)
    for words, templates in make.LANGUAGES.values():
        assert len(set(words.split())) == 10 and len(set(templates)) >= 4
    found = {make.caption(8, rng) for _ in range(400)}
    assert len(found) == sum(len(templates) for _, templates in make.LANGUAGES.values())
    assert all(any(word in text for word in ("eight", "Acht", "huit", "ocho", "osiem")) for text in found)


def test_avmnist(tool: Any, tmp_path: Path) -> None:
    mnist, fsdd = data("mnist"), data("fsdd")
    pytest.importorskip("soundfile", reason="sound is decoded by soundfile")
    make = tool("data.avmnist")
    for name in ("out", "again"):
        make.main([str(mnist), str(fsdd), str(tmp_path / name), "--train", "60", "--test", "20"])
    assert sound(tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()
    labels = {"train": make.idx(mnist, "train-labels-idx1-ubyte"), "test": make.idx(mnist, "t10k-labels-idx1-ubyte")}
    for split, count in (("train", 60), ("test", 20)):
        found = read(tmp_path / "out", split)
        of_take = {p.read_bytes(): p for paths in make.recordings(fsdd, split == "test") for p in paths}
        assert len(found) == count
        for key, sample in found.items():
            recording = of_take[sample["wav"]].stem.split("_")
            assert int(sample["cls"]) == labels[split][int(key[-5:])] == int(recording[0])
            assert (int(recording[2]) < 5) == (split == "test")


def test_long_tail(tool: Any) -> None:
    tail, rng = tool("data.long_tail"), np.random.default_rng(0)
    order = tail.positions(10)
    assert sorted(order) == list(range(10)) and abs(np.corrcoef(order, np.arange(10))[0, 1]) < 0.1
    labels = np.repeat(np.arange(10), 500)
    # The profile: class at position p has 500 * 100 ** (-p / 9), and only those of its own.
    expected = [round(500 * 100 ** (-p / 9)) for p in order]
    rows = tail.drawn(labels, None, 100, rng)
    assert np.bincount(labels[rows]).tolist() == expected and len(set(rows.tolist())) == len(rows)
    assert (np.diff(labels[rows]) < 0).any()  # shuffled
    counts = np.bincount(labels[tail.drawn(labels, 1000, 10, rng)])
    assert counts.sum() == 1000 and counts.max() / counts.min() == pytest.approx(10, rel=0.05)
    assert np.array_equal(counts.argsort()[::-1], order.argsort())
    # A class with few samples sets the scale.
    uneven = np.concatenate([labels[labels != 4], [4] * 50])
    assert np.bincount(uneven[tail.drawn(uneven, None, 100, rng)])[4] <= 50


def test_without_a_tail_classes_keep_their_shares(tool: Any) -> None:
    tail, rng = tool("data.long_tail"), np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 500)
    even = tail.drawn(labels, 1000, 1.0, rng)
    assert len(set(even.tolist())) == 1000 and (np.bincount(labels[even]) == 100).all()
    assert tail.drawn(labels, None, 1.0, rng).tolist() == list(range(5000))


def test_what_is_set_aside_is_balanced_and_not_drawn_again(tool: Any) -> None:
    tail = tool("data.long_tail")
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    options = argparse.Namespace(train=60, tail=10.0, val=4)
    found = [tail.parts(labels, options, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.bincount(labels[found[0]["val"]]).tolist() == [4] * 5 and len(found[0]["train"]) == 60
    assert not set(found[0]["val"].tolist()) & set(found[0]["train"].tolist())
    same = [[np.array_equal(found[0][split], other[split]) for split in ("train", "val")] for other in found[1:]]
    assert same == [[True, True], [False, False]]


@pytest.mark.parametrize(
    "total, ratio, val, says",
    [
        (4000, 10, 0, "of class . are wanted, there are 500; ask for fewer"),
        (20, 100, 0, "class . would be left without a sample by --tail 100; give a lower one"),
        (None, 0.1, 0, "--tail is 0.1, the most frequent class over the rarest; give 1 or more"),
        (None, 1, 500, "--val 500 leaves nothing of the 500 of class 0; ask for fewer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tool: Any, total: int | None, ratio: float, val: int, says: str) -> None:
    options = argparse.Namespace(train=total, tail=ratio, val=val)
    with pytest.raises(ValueError, match=says):
        tool("data.long_tail").parts(np.repeat(np.arange(10), 500), options, np.random.default_rng(0))


def test_mfeat(tool: Any, tmp_path: Path) -> None:
    folder, make = data("mfeat"), tool("data.mfeat")
    make.main([str(folder), str(tmp_path / "out")])
    assert sound(tmp_path / "out")
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    assert set(Counter(s["cls"] for s in train.values()).values()) == {160}
    assert set(Counter(s["cls"] for s in test.values()).values()) == {40}
    table = np.loadtxt(folder / "mfeat-mor.csv", delimiter=",", skiprows=1)
    features = np.load(io.BytesIO((train | test)["mfeat-01234"]["mor.npy"]))
    stats = json.loads((tmp_path / "out/stats.json").read_text())["mor"]
    np.testing.assert_allclose(features * stats["std"] + stats["mean"], table[1234, :-1], rtol=1e-4)
    rows = np.stack([np.load(io.BytesIO(s["mor.npy"])) for s in train.values()]).astype(float)
    np.testing.assert_allclose([rows.mean(axis=0), rows.std(axis=0)], [[0] * 6, [1] * 6], atol=1e-4)


def test_a_feature_of_mfeat_that_never_changes_is_not_divided_by_zero(tool: Any) -> None:
    found = tool("data.mfeat").constants(np.array([[1, 5], [3, 5]], np.float32))
    np.testing.assert_array_equal([found["mean"], found["std"]], [[2, 5], [1, 1]])


def test_captions(tool: Any, tmp_path: Path) -> None:
    folder = data("coco_mini_open")
    tool("data.captions").main([str(folder / "images"), str(folder / "captions.json"), str(tmp_path / "out")])
    assert sound(tmp_path / "out")
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    assert (len(train), len(test)) == (41, 10) and not train.keys() & test.keys()
    assert all(len(json.loads(s["json"])["captions"]) == 5 for s in train.values())
    for key, sample in test.items():
        assert sample["jpg"] == (folder / "images" / f"{key}.jpg").read_bytes()
    assert json.loads((train | test)["000000159269"]["json"])["license"] == 5


def test_flat_captions(tool: Any, tmp_path: Path) -> None:
    texts = {f"{i}.png": [f"caption {i}", "another"] for i in range(10)} | {"none.png": []}
    (tmp_path / "c.json").write_text(json.dumps(texts))
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"%d" % i)
    arguments = [str(tmp_path), str(tmp_path / "c.json"), str(tmp_path / "out"), "--txt"]
    with pytest.raises(ValueError, match=r"no image '9.png' in .*give the images' folder"):
        tool("data.captions").main(arguments)
    (tmp_path / "9.png").write_bytes(b"9")
    tool("data.captions").main(arguments)
    found = read(tmp_path / "out", "train") | read(tmp_path / "out", "test")
    assert {key: (s["png"], s["txt"]) for key, s in found.items()} == {
        str(i): (b"%d" % i, b"caption %d" % i) for i in range(10)
    }


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(tool: Any, tmp_path: Path, packed: bool) -> None:
    source = tmp_path / "cifar"
    for split, count in (("train", 6), ("test", 2)):
        for label in ("cat", "airplane"):
            (source / split / label).mkdir(parents=True)
            for i in range(count):
                (source / split / label / f"{i:04d}.jpg").write_bytes(f"{split} {label} {i}".encode())
    if packed:
        with tarfile.open(tmp_path / "cifar.tar.xz", "w:xz") as tar:
            tar.add(source, "some/where")
        source = tmp_path / "cifar.tar.xz"
    tool("data.cifar10").main([str(source), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["airplane", "cat"]
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    assert (len(train), len(test)) == (12, 4)
    assert train["train_cat_0003"] == {"jpg": b"train cat 3", "cls": b"1"}
    assert [s["cls"] for s in train.values()] != sorted(s["cls"] for s in train.values())


def test_cifar10_refuses_another_layout(tool: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold train/<class>/\*.jpg"):
        tool("data.cifar10").load(tmp_path)


def test_cifar10_in_a_long_tail(tool: Any, tmp_path: Path) -> None:
    source = tmp_path / "cifar"
    for split, count in (("train", 40), ("test", 3)):
        for label in ("cat", "dog", "emu"):
            (source / split / label).mkdir(parents=True)
            for i in range(count):
                (source / split / label / f"{i:04d}.jpg").write_bytes(f"{split} {label} {i}".encode())
    for name in ("out", "again"):
        tool("data.cifar10").main([str(source), str(tmp_path / name), "--tail", "9", "--val", "4"])
    for shard in (tmp_path / "out").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()
    train, val, test = (read(tmp_path / "out", split) for split in ("train", "val", "test"))
    assert sorted(Counter(s["cls"] for s in train.values()).values()) == [4, 12, 36]
    for part, each in ((val, 4), (test, 3)):
        assert list(Counter(s["cls"] for s in part.values()).values()) == [each] * 3
    assert not train.keys() & val.keys()


def test_eurosat(tool: Any, tmp_path: Path) -> None:
    source, make = data("eurosat_2k5"), tool("data.eurosat")
    make.main([str(source), str(tmp_path / "out"), "--tail", "50"])
    assert sound(tmp_path / "out")
    train, val, test = (read(tmp_path / "out", split) for split in ("train", "val", "test"))
    frequency = Counter(s["cls"] for s in train.values())
    assert (max(frequency.values()), min(frequency.values())) == (170, 3)  # 170 / 50
    assert {tuple(Counter(s["cls"] for s in part.values()).values()) for part in (val, test)} == {
        (20,) * 10,
        (60,) * 10,
    }
    for split, found in (("train", train), ("val", val), ("test", test)):
        for key, sample in found.items():
            _, label, number = key.split("_")
            assert sample["cls"] == label.encode()
            assert sample["png"] == (source / split / label / f"{number}.png").read_bytes()
    assert json.loads((tmp_path / "out/classes.json").read_text())[9] == "SeaLake"


def test_eurosat_refuses_other_labels(tool: Any, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "0.png").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"has the labels \['cat'\]; EuroSAT's are 0 to 9"):
        tool("data.eurosat").main([str(tmp_path), str(tmp_path / "out")])

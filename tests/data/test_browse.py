"""The page is self-contained and escaped, the sheet is a picture with something in it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvpretrain.data.browse import choose_samples, sheet, show
from mvpretrain.shards.index import Index
from mvpretrain.shards.pack import write
from tests.shards.samples import picture, tone


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("shards")
    pytest.importorskip("soundfile", reason="sound is decoded by soundfile")
    rows = [
        {
            "__key__": f"key-{i}",
            "jpg": picture(),
            "tif": picture("TIFF"),
            "txt": f"<script>{i}</script> costs $5 & $6, 日本",
            "wav": tone(),
            "line.npy": np.arange(50.0),
            "channels.npy": np.random.default_rng(i).normal(size=(3, 60)),
            "map.npy": np.full((9, 9), np.nan),
            "spectrum.npy": np.ones((8, 8), np.complex64),
            "json": {"captions": ["ä", 1]},
            "bin": b"\xff\xfe",
            "cls": i,
        }
        for i in range(4)
    ]
    del rows[0]["txt"]
    rows[1]["jpg"] = b"broken"
    write(rows, out, "x", shard_samples=3)
    return str(out)


def rows_of(page: str) -> list[list[ElementTree.Element]]:
    """The table's cells; the page's void tags are closed first, so that a strict parser can read it."""
    strict = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", page.replace("audio controls ", "audio "))
    return [list(row) for row in ElementTree.fromstring(strict.partition("\n")[2]).iter("tr")]


def test_page(shards: str, tmp_path: Path) -> None:
    page = show(shards, tmp_path / "new/page.html", count=10).read_text(encoding="utf-8")
    head, *rows = rows_of(page)
    names = [cell.text for cell in head]
    assert names[0] == "sample" and "cls" not in names and len(rows) == 4
    assert [row[0].findtext("b") for row in rows] == [f"key-{i}" for i in range(4)]
    assert [small.text for small in rows[3][0].iter("small")][::2] == ["cls 3", "x-000001.tar"]
    cells = [dict(zip(names, row)) for row in rows]
    assert cells[2]["txt"].findtext("p") == "<script>2</script> costs $5 & $6, 日本"
    assert cells[0]["txt"].findtext("i") == "absent"
    assert "does not decode: UnidentifiedImageError" in (cells[1]["jpg"].findtext("em/small") or "")
    assert cells[2]["bin"].findtext("p") == "2 bytes"
    assert "<script" not in page and "http" not in page
    kinds = {
        name: [i.get("src", "").partition(",")[0] for i in cell.iter() if i.get("src")]
        for name, cell in cells[2].items()
    }
    assert kinds["jpg"] == ["data:image/jpeg;base64"] and kinds["tif"] == ["data:image/png;base64"]
    assert kinds["wav"] == ["data:audio/wav;base64", "data:image/png;base64"]
    assert all(kinds[f"{name}.npy"] == ["data:image/png;base64"] for name in ("line", "channels", "map", "spectrum"))


def test_sheet(shards: str, tmp_path: Path) -> None:
    with Image.open(show(shards, tmp_path / "sheet.png", count=3)) as found:
        pixels = np.asarray(found.convert("L"))
    # The sheet is white where nothing is drawn: each third, one sample, must hold ink.
    assert all((third < 128).mean() > 0.01 for third in np.array_split(pixels, 3))


def test_samples_of_few_fields_stand_beside_one_another(tmp_path: Path) -> None:
    write([{"__key__": f"key-{i}", "txt": f"text {i}"} for i in range(9)], tmp_path, "x")
    figure = sheet(choose_samples(Index.find(str(tmp_path)), 9, 0, None))
    place = {t.get_text().split("\n")[0]: axes.get_position() for axes in figure.axes for t in axes.texts}
    assert len({(p.x0, p.y0) for p in place.values()}) == len(place) == 18
    assert all(place[f"key-{i}"].y0 == place[f"text {i}"].y0 for i in range(9))
    assert len({place[f"key-{i}"].x0 for i in range(9)}) == 3


def test_samples_are_drawn_by_the_seed(shards: str) -> None:
    def keys(seed: int) -> list[str]:
        return [sample.key for sample in choose_samples(Index.find(shards), 3, seed, None)]

    assert keys(0) == keys(0) and len({tuple(keys(seed)) for seed in range(4)}) > 1 and len(set(keys(1))) == 3


def test_bad_requests_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'page.pdf' ends in '.pdf'; write .*NAME.html"):
        show(shards, tmp_path / "page.pdf")
    with pytest.raises(ValueError, match="count is 0, at least 1"):
        show(shards, tmp_path / "page.html", count=0)

"""Images with captions in COCO's format as shards.

    python -m tools.data.captions IMAGES_FOLDER CAPTIONS_JSON OUT [--txt]

CAPTIONS_JSON is COCO's {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, or the flat
{"file.jpg": ["a caption", "another"]}. Fields: the image under its ending, `jpg` as a rule, and `json`, {"captions":
[...]} with the image's `license` and `flickr_url` where COCO's file states them, so that attribution travels along;
with --txt also `txt`, the first caption. A fifth of the images is held out as `test`. Images without a caption are left
out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mvpretrain.shards.pack import write_splits
from mvpretrain.shards.plans import safe


def load(path: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"captions": [...]}} in the order of the images, those without captions left out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "annotations" not in content:
        found = {name: {"captions": [c] if isinstance(c, str) else list(c)} for name, c in content.items()}
    else:
        kept = ("license", "flickr_url")
        images = {i["id"]: {"captions": []} | {k: i[k] for k in kept if k in i} for i in content["images"]}
        for note in content["annotations"]:
            if note["image_id"] not in images:
                raise ValueError(
                    f"a caption belongs to the image {note['image_id']!r}, which {path.name!r} does not list"
                )
            images[note["image_id"]]["captions"].append(note["caption"].strip())
        found = {i["file_name"]: images[i["id"]] for i in content["images"]}
    return {name: texts for name, texts in found.items() if texts["captions"]}


def samples(
    folder: Path, texts: dict[str, dict[str, Any]], names: Iterable[str], txt: bool
) -> Iterator[dict[str, Any]]:
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"no image {name!r} in {str(folder)!r}, which the captions name; give the images' folder")
        sample = {"__key__": safe(str(Path(name).with_suffix(""))), path.suffix[1:].lower(): path.read_bytes()}
        yield sample | {"json": texts[name]} | ({"txt": texts[name]["captions"][0]} if txt else {})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES_FOLDER")
    parser.add_argument("captions", type=Path, metavar="CAPTIONS_JSON")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--txt", action="store_true", help="store the first caption as txt too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    texts = load(args.captions)
    names = list(texts)
    random.Random(args.seed).shuffle(names)
    held_out = round(len(names) / 5)
    parts = {"train": names[held_out:], "test": names[:held_out]}
    splits = {split: samples(args.images, texts, part, args.txt) for split, part in parts.items()}
    for name, written in write_splits(args.out, splits, shard_samples=1000).items():
        print(f"{name}: {written}")


if __name__ == "__main__":
    main()

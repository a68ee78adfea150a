"""What shards could be trained on: their fields, the view that each could be, statistics, and a split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from mvpretrain.data.guess_view import VIEWS
from mvpretrain.data.sources.shards import Tars
from mvpretrain.shards.index import ID, SHARD, Index
from mvpretrain.types import BadSample

SAMPLED = 256  # samples of a field that are decoded
RARE = 0.05  # a field that a smaller share of the samples has is no view
ENDINGS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus"),
    "text": ("txt", "text", "caption"),
    "array": ("npy",),
    "json": ("json",),
    "class": ("cls",),
}
KIND_OF = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
FIRST_BYTES = {b"\xff\xd8\xff": "image", b"\x89PNG": "image", b"RIFF": "audio", b"fLaC": "audio", b"\x93NUMPY": "array"}
HELD_OUT = re.compile(r"(?:^|[-_.])(?:test|val|valid|validation|eval|dev|held_?out)(?:[-_.]|\d|$)", re.IGNORECASE)


class ViewGuess(NamedTuple):
    """A view that fields of the samples could be: settings as a recipe writes them."""

    name: str
    settings: dict[str, Any]
    encoder: dict[str, Any]  # a small one that takes the view
    samples: int  # of the training shards, with this view
    measured: str  # what the settings were taken from, for a person to read


class Guess(NamedTuple):
    """What `guess` found. Shards are spelled as a recipe names them."""

    views: list[ViewGuess]
    others: dict[str, str]  # field -> why it is no view
    train: list[str]
    eval: list[str]
    train_samples: int
    eval_samples: int
    label: str | None  # the field that holds an integer class
    ids: str  # as `data.ids` of a recipe


def guess(urls: str | Sequence[str], cache: Path | None = None) -> Guess:
    """The views that shards could have, from at most 256 decoded samples a field, evenly spaced, without randomness.

    A view is guessed by the field's ending, or by its first bytes. Shards whose names say test, val, eval or dev are
    held out, or else the last of several. One lone view becomes two augmentations of itself. ValueError: shards that
    are not there, or nothing in them that could be two views.
    """
    index = Index.find(urls, cache)
    train, held_out = (index.pick(numbers) if numbers else None for numbers in split(index))
    assert train
    parts = [part for part in (train, held_out) if part]
    kinds = list(columns(train, cache))
    found, others = views_and_others(train, parts, kinds, cache)
    label = next((fields[0] for fields, kind in kinds if kind == "class"), None)
    views = found if len(found) != 1 else augmentations(found[0])
    if len(views) < 2:
        seen = [f"{v.settings['field']}: {v.settings['kind']}" for v in found]
        what = "; ".join([*seen, *map(": ".join, others.items()), *([f"{label}: a class"] if label else [])])
        raise ValueError(f"two views are needed, and the fields are {what}; pack samples with two fields or more")
    ids = next((how for how in map(identity, parts) if how != "unique"), "unique")
    here, there = (spelled([s.url for s in part.shards]) if part else [] for part in (train, held_out))
    return Guess(views, others, here, there, len(train), len(held_out) if held_out else 0, label, ids)


def views_and_others(
    train: Index, parts: Sequence[Index], kinds: Sequence[tuple[list[str], str]], cache: Path | None
) -> tuple[list[ViewGuess], dict[str, str]]:
    """The views that the fields of each kind could be, and of the other fields why they are none."""
    found: list[ViewGuess] = []
    others: dict[str, str] = {}
    for fields, kind in kinds:
        rows, field = having(train, fields), ";".join(fields)
        if len(rows) < RARE * len(train):
            others[field] = f"only {len(rows):,} of {len(train):,} samples have it"
        elif kind in VIEWS:
            chosen = rows[np.arange(min(SAMPLED, len(rows))) * len(rows) // min(SAMPLED, len(rows))]
            outcome = VIEWS[kind](partial(raws, train, fields, chosen, cache))
            if isinstance(outcome, str):
                others[field] = outcome
                continue
            settings = {"kind": outcome[0]["kind"], "field": field} | outcome[0]
            if any(lacks(part, fields) for part in parts):
                settings["missing"] = "any"
            name = named(fields, settings.get("key", settings["kind"]), [view.name for view in found])
            found.append(ViewGuess(name, settings, outcome[1], len(rows), outcome[2]))
        elif kind != "class":
            others[field] = f"nothing here reads the ending {field.rpartition('.')[2]!r}"
    return found, others


def split(index: Index) -> tuple[list[int], list[int]]:
    """Numbers of the shards to train on, and of those held out: the ones whose names say so, or else the last.

    A view must be both trained and scored, so that a shard is not held out which lacks a field that the others have, or
    alone has it.
    """

    def complete(numbers: Sequence[int]) -> bool:
        return all(any(index.shards[n].fields.get(f) for n in numbers) for f in common)

    numbers = range(len(index.shards))
    common = [f for f in index.fields if sum(s.fields.get(f, 0) for s in index.shards) >= RARE * len(index)]
    said = [n for n in numbers if HELD_OUT.search(Path(index.shards[n].url).stem)]
    if 0 < len(said) < len(numbers):
        return [n for n in numbers if n not in said], said if complete(said) else []
    rest = {n: [m for m in numbers if m != n] for n in numbers}
    last = next((n for n in reversed(numbers) if rest[n] and complete([n]) and complete(rest[n])), None)
    return (list(numbers), []) if last is None else (rest[last], [last])


def spelled(urls: Sequence[str]) -> list[str]:
    """Urls as short as a recipe can have them: relative to this folder, a run of numbers as {000..007}."""
    here = str(Path.cwd()) + "/"
    urls = [url.removeprefix(here) for url in urls]
    parts = [part for url in urls if (part := re.fullmatch(r"(.*?)(\d+)(\D*)", url))]
    if 1 < len(urls) == len(parts):
        before, first, after = parts[0].groups()
        last = parts[-1][2]
        if urls == [f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last) + 1)]:
            return [f"{before}{{{first}..{last}}}{after}"]
    return urls


def identity(index: Index) -> str:
    """What makes two samples the same thing: `data.ids` under which the keys of these shards can be trained on."""
    if len(np.unique(index.table[:, ID])) == len(index):
        return "unique"
    return "shard" if len(np.unique(index.table[:, [SHARD, ID]], axis=0)) == len(index) else "key"


def columns(index: Index, cache: Path | None) -> Iterator[tuple[list[str], str]]:
    """(fields, kind) of each thing a sample may hold: `jpg` and `png` are one where no sample has both."""
    grouped: list[tuple[list[str], str, str]] = []
    counts = {f: sum(s.fields.get(f, 0) for s in index.shards) for f in index.fields}
    for field in sorted((f for f in index.fields if counts[f]), key=lambda f: -counts[f]):
        stem, _, ending = field.rpartition(".")
        kind = KIND_OF.get(ending) or by_first_bytes(index, field, cache)
        for fields, of, other in grouped:
            if (kind, stem) == (of, other) and kind in ("image", "audio") and disjoint(index, field, fields):
                fields.append(field)
                break
        else:
            grouped.append(([field], kind, stem))
    yield from ((fields, kind) for fields, kind, _ in sorted(grouped))


def by_first_bytes(index: Index, field: str, cache: Path | None) -> str:
    """The kind of a field whose ending says nothing, "" where its first sample's bytes say nothing either."""
    first = next(raws(index, [field], having(index, [field])[:1], cache), b"")
    if first[8:12] == b"WEBP":  # RIFF too, as sound is
        return "image"
    return next((kind for start, kind in FIRST_BYTES.items() if first.startswith(start)), "")


def having(index: Index, fields: Sequence[str]) -> np.ndarray:
    """The rows of the index that have one of the fields."""
    return np.flatnonzero((index.table[:, [index.offset(f) for f in fields]] >= 0).any(axis=1))


def disjoint(index: Index, field: str, fields: Sequence[str]) -> bool:
    return not len(np.intersect1d(having(index, [field]), having(index, fields)))


def lacks(index: Index, fields: Sequence[str]) -> bool:
    """Whether a whole shard has none of the fields."""
    return any(shard.nsamples and not any(shard.fields.get(f) for f in fields) for shard in index.shards)


def raws(index: Index, fields: Sequence[str], rows: np.ndarray, cache: Path | None) -> Iterator[bytes]:
    """The bytes of the first of the fields that each row has. Rows that cannot be read are left out."""
    tars = Tars(index, cache=cache)
    tars.columns = {f: index.offset(f) for f in fields}
    for row in rows.tolist():
        try:
            sample = tars.read(row).fields
        except BadSample:
            continue
        yield next(sample[f] for f in fields if f in sample)


def named(fields: Sequence[str], otherwise: str, taken: Sequence[str]) -> str:
    """A name for a view and its tower: what stands before the field's ending (`fou` of `fou.npy`), if anything."""
    stem = re.sub(r"\W+", "_", fields[0].rpartition(".")[0] or otherwise)
    longer = f"{stem}_{fields[0].rpartition('.')[2]}"
    names = (stem, longer, *(f"{longer}_{i}" for i in range(2, len(taken) + 3)))
    return next(n for n in names if n not in taken and not hasattr(nn.ModuleDict(), n))


def augmentations(view: ViewGuess) -> list[ViewGuess]:
    """A lone view as two, each augmented by itself, on one tower; [] where its kind has no augmentation."""
    strong = {
        "image": "simclr",
        "audio": "specaugment",
        "series": {"crop": 0.5, "scaling": 0.1, "jitter": 0.1},
        "vector": {"noise": 0.3, "dropout": 0.2},
    }
    if view.settings["kind"] not in strong:
        return []
    settings = view.settings | {"tower": view.name, "augment": strong[view.settings["kind"]]}
    return [view._replace(name=f"{view.name}_{n}", settings=settings) for n in (1, 2)]

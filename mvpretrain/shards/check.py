"""Whether every sample of every shard decodes: one pass over all bytes, before a run is paid for."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from mvpretrain.shards.headers import decode_name, read_headers, refuse_other_formats
from mvpretrain.shards.urls import expand, local_copy, spelled_commands

Views = Mapping[str, tuple[str | Sequence[str], Callable[[Any], Any]]]


class Fault(NamedTuple):
    """A field of a sample that does not decode."""

    shard: str
    key: str
    field: str
    reason: str


class Report(NamedTuple):
    """What `check` found. `good` is whether training would meet every sample as it is meant."""

    samples: int
    ok: int  # samples of which every field decodes
    reasons: dict[str, int]  # "jpg: OSError" -> how often
    examples: tuple[Fault, ...]  # the first few, at most two a reason
    truncated: dict[str, str]  # shard -> what is wrong with the tar itself
    missing: dict[str, dict[str, int]]  # shard -> field -> how many of its samples lack it, where some sample has it
    duplicates: tuple[str, ...]  # keys that come more than once, in one shard or in several
    unchecked: dict[str, int]  # field -> how often, where nothing here can decode its ending

    @property
    def good(self) -> bool:
        return self.samples > 0 and not (self.reasons or self.truncated or self.duplicates)


class Audio(NamedTuple):
    wave: np.ndarray  # time channels, float32 in [-1, 1]
    rate: int  # samples a second


class ShardFaults(NamedTuple):
    """What was found in one shard."""

    url: str
    keys: list[str]
    bad: set[int]  # numbers of the samples with a fault
    faults: list[Fault]
    fields: Counter[str]
    unchecked: Counter[str]
    broken: list[str]  # empty, or why the tar breaks off


def check(
    urls: str | Sequence[str],
    views: Views | None = None,
    cache: Path | None = None,
    ids: Literal["unique", "key", "shard"] = "unique",
    examples: int = 10,
    workers: int | None = None,
) -> Report:
    """Decode every sample of the shards, each shard by one thread; remote ones are fetched to `cache` first.

    Without `views`, fields are decoded by their ending (`decoder`). `views` maps a name to (fields, transform): the
    first of "jpg;png" that a sample has goes through the transform, whose output must be finite. `ids` is the recipe's
    `data.ids`: whether equal keys are faults everywhere, nowhere, or within a shard. ValueError: no shard.
    """
    check_one = partial(check_shard, views=views, cache=cache, commands=spelled_commands(urls))
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(check_one, expand(urls)))
    faults = [fault for part in parts for fault in part.faults]
    keys = Counter((part.url if ids == "shard" else "", key) for part in parts for key in part.keys)
    seen = sum((part.fields for part in parts), Counter[str]())
    lacking = {p.url: {f: len(p.keys) - p.fields[f] for f in sorted(seen) if p.fields[f] < len(p.keys)} for p in parts}
    kinds = [f"{p.field}: {p.reason.partition(':')[0]}" for p in faults]
    return Report(
        samples=keys.total(),
        ok=keys.total() - sum(len(part.bad) for part in parts),
        reasons=dict(Counter(kinds).most_common()),
        examples=tuple(two_of_each(faults, kinds)[:examples]),
        truncated={part.url: part.broken[0] for part in parts if part.broken},
        missing={url: fields for url, fields in lacking.items() if fields},
        duplicates=tuple(key for (_, key), n in keys.items() if n > 1 and ids != "key"),
        unchecked=dict(sum((part.unchecked for part in parts), Counter[str]())),
    )


def two_of_each(faults: Sequence[Fault], kinds: Sequence[str]) -> list[Fault]:
    """The first two faults of each kind: one frequent fault must not hide the others."""
    met, shown = Counter[str](), []
    for fault, kind in zip(faults, kinds):
        met[kind] += 1
        if met[kind] <= 2:
            shown.append(fault)
    return shown


def check_shard(url: str, views: Views | None, cache: Path | None, commands: Collection[str]) -> ShardFaults:
    """One shard, sample by sample, up to where its tar breaks off."""
    part = ShardFaults(url, [], set(), [], Counter(), Counter(), [])
    try:
        for key, members in samples_of(url, cache, commands, part.broken):
            found = faults_by_view(members, views) if views else faults_by_ending(members, part.unchecked)
            if found:
                part.bad.add(len(part.keys))
            part.keys.append(key)
            part.fields.update(members.keys())
            part.faults.extend(Fault(url, key, field, reason) for field, reason in found)
    except (OSError, ValueError) as error:
        part.broken.append(str(error))
    return part


def samples_of(
    url: str, cache: Path | None, commands: Collection[str], broken: list[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, raw fields) of a shard's samples; why the tar breaks off, where it does, is added to `broken`."""
    with local_copy(url, cache, commands=commands).open("rb") as file:
        refuse_other_formats(file.read(512), url)
        with mmap(file.fileno(), 0, access=ACCESS_READ) as tar:
            headers = read_headers(tar, url)
            broken += [headers.reason] if headers.reason else []
            for sample, members in groupby(headers.members, key=lambda member: member[0]):
                raws = {headers.fields[field]: tar[offset : offset + size] for _, field, offset, size in members}
                yield decode_name(headers.keys[sample]), raws


def faults_by_ending(members: Mapping[str, bytes], unchecked: Counter[str]) -> list[tuple[str, str]]:
    """(field, reason) of the fields that do not decode by their ending."""
    found = []
    for field, raw in members.items():
        decode = decoder(field)
        if not raw:
            found.append((field, "Empty: 0 bytes"))
        elif decode is None:
            unchecked[field] += 1
        elif reason := failure(decode, raw):
            found.append((field, reason))
    return found


def faults_by_view(members: Mapping[str, bytes], views: Views) -> list[tuple[str, str]]:
    """(field, reason) of the fields whose view cannot be made; a sample without any view is a fault as well."""
    found, made = [], 0
    for fields, transform in views.values():
        field = next((f for f in alternatives(fields) if f in members), None)
        if field is None:
            continue
        made += 1
        if reason := failure(partial(finite, transform), members[field]):
            found.append((field, reason))
    if not made:
        found.append(("", f"Viewless: none of {', '.join(views)} among its fields {', '.join(members)}"))
    return found


def alternatives(fields: str | Sequence[str]) -> Sequence[str]:
    return fields.split(";") if isinstance(fields, str) else fields


def finite(transform: Callable[[Any], Any], raw: bytes) -> None:
    data = transform(raw).data
    if data.is_floating_point() and not bool(data.isfinite().all()):
        raise ValueError("the view holds numbers that are not finite")


def failure(decode: Callable[[bytes], Any], raw: bytes) -> str:
    """Why a field does not decode, "" where it does. Whatever a library raises is what we are here to find."""
    try:
        decode(raw)
    except Exception as error:
        return f"{type(error).__name__}: " + re.sub(r" <?_?io\.BytesIO object at 0x\w+>?", " the bytes", str(error))
    return ""


def decoder(field: str) -> Callable[[bytes], Any] | None:
    """What reads a field of this ending: images fully decoded, arrays, JSON, text, sound, class numbers; else None."""
    ending = field.rpartition(".")[2]
    if ending in SOUND and find_spec("soundfile") is None:
        return None
    return DECODERS.get(ending)


def image(raw: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(raw))
    picture.load()
    return picture


def array(raw: bytes) -> np.ndarray:
    return np.load(io.BytesIO(raw), allow_pickle=False)


def arrays(raw: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(raw), allow_pickle=False) as file:
        return dict(file)


def sound(raw: bytes) -> Audio:
    import soundfile

    wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    if len(wave) == 0:
        raise ValueError("the recording has no samples")
    return Audio(wave, rate)


IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SOUND = ("wav", "flac", "ogg", "mp3", "opus")
DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGES, image),
    **dict.fromkeys(SOUND, sound),
    **dict.fromkeys(("txt", "text", "caption"), lambda raw: raw.decode("utf-8")),
    **dict.fromkeys(("json",), json.loads),
    **dict.fromkeys(("cls", "id"), int),
    "npy": array,
    "npz": arrays,
}

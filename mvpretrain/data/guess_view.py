"""One field's bytes to the view that it could be: settings, a small encoder, and the statistics they are taken from."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from mvpretrain.views.audio import AudioConfig
from mvpretrain.views.audio import decode as decode_sound
from mvpretrain.views.image import pixels

LARGEST = 4096  # numbers of an array that is laid flat, and steps of a series
CAPTIONS = ("caption", "text", "title", "description", "prompt")  # keys of JSON objects, the likeliest first

# Gives the field's bytes, sample by sample, from the start at every call.
Raws = Callable[[], Iterator[bytes]]
# Settings of the view and of its encoder, and what was measured; or a clause that says why the field is no view.
Outcome = tuple[dict[str, Any], dict[str, Any], str] | str


class Facts(NamedTuple):
    """An array, without keeping it."""

    shape: tuple[int, ...]
    kind: str  # numpy's letter for the type
    flat: np.ndarray | None  # float64, where it is small
    mean: float
    square: float  # mean of the squares


def measure(found: Raws, decode: Callable[[bytes], Any]) -> tuple[list[Any], str]:
    """What `decode` makes of each, and a clause about those that fail. [] where that is most of them."""
    facts, failed = [], []
    for raw in found():
        try:
            facts.append(decode(raw))
        except Exception as error:  # what a library raises on damaged data is what we look for
            failed.append(error)
    clause = f"{len(failed)} of {len(facts) + len(failed)} do not decode" if failed else ""
    if len(failed) > len(facts):
        return [], f"{clause}: {str(failed[0]).splitlines()[0]}"
    return facts, f"; {clause}" if failed else ""


def image(found: Raws) -> Outcome:
    def look(raw: bytes) -> tuple[Any, ...]:
        whole = pixels(raw, 3)
        step = max(1, min(whole.shape[1:]) // 128)  # some thousand pixels an image are enough
        x = whole[:, ::step, ::step].double().flatten(1) / 255
        return whole.shape[1:], bool((x == x[0]).all()), x.mean(dim=1).numpy(), x.square().mean(dim=1).numpy()

    facts, clause = measure(found, look)
    if not facts:
        return clause
    shapes, grey, means, squares = zip(*facts)
    channels = 1 if all(grey) else 3
    mean = np.mean(means, axis=0)[:channels]
    std = np.sqrt(np.maximum(np.mean(squares, axis=0)[:channels] - mean**2, 1e-4))
    sides = [min(shape) for shape in shapes]
    size = min(64, max(8, int(np.median(sides))))
    settings = {"kind": "image", "size": size, "channels": channels}
    settings |= {"normalize": {"mean": rounded(mean), "std": rounded(std)}}
    settings |= {"augment": {"preset": "crop", "crop": [0.6, 1.0], "flip": 0}}
    encoder = {"kind": "conv", "channels": channels, "width": 32, "stages": 2 if size < 16 else 3}
    colours = "grey" if channels == 1 else "colour"
    return settings, encoder, f"{colours}, shorter side {span(sides)} pixels{clause}"


def audio(found: Raws) -> Outcome:
    if find_spec("soundfile") is None:
        return "sound, whose reader is not installed: pip install 'mvpretrain[audio]', and ask again"

    def look(raw: bytes) -> tuple[float, int]:
        wave, rate = decode_sound(raw)
        return wave.shape[1] / rate, rate

    facts, clause = measure(found, look)
    if not facts:
        return clause
    seconds, rates = zip(*facts)
    settings = {"kind": "audio", "rate": min(16000, max(rates))}
    settings |= {"seconds": min(10.0, max(0.1, math.ceil(10 * np.quantile(seconds, 0.9)) / 10))}
    settings |= {"window": settings["rate"] // 40, "hop": settings["rate"] // 100}
    for mels in (64, 40, 24, 12):
        try:
            frames = AudioConfig.model_validate(settings | {"mels": mels}).frames
        except ValidationError:
            continue
        encoder = series_encoder(mels, frames)
        measured = f"{span(seconds, '.2f')} seconds, {span(rates)} Hz{clause}"
        return settings | {"mels": mels, "augment": "specaugment"}, encoder, measured
    return f"sound of {max(rates):,} Hz, too low for a spectrogram"


def text(found: Raws) -> Outcome:
    texts, clause = measure(found, lambda raw: raw.decode("utf-8"))
    return of_texts(texts, clause) if any(t.strip() for t in texts) else clause or "no text in it"


def of_texts(texts: Sequence[str], clause: str) -> Outcome:
    lines = sum(len([line for line in t.splitlines() if line.strip()]) > 1 for t in texts) > len(texts) / 2
    pieces = [piece for t in texts for piece in (t.splitlines() if lines else [t]) if piece.strip()]
    sizes = [len(piece.strip().encode()) for piece in pieces]
    length = min(128, 8 * math.ceil((np.quantile(sizes, 0.95) + 2) / 8))
    settings = {"kind": "text", "tokenizer": "bytes", "length": length} | ({"lines": True} if lines else {})
    encoder = {"kind": "transformer", "length": length, "width": 64, "depth": 2, "heads": 4}
    return settings, encoder, f"{span(sizes)} bytes{clause}"


def from_json(found: Raws) -> Outcome:
    values, clause = measure(found, json.loads)
    if not values:
        return clause
    if all(isinstance(v, dict) for v in values):
        keys = sorted({k for v in values for k, x in v.items() if isinstance(x, str) and x.strip()})
        chosen = next((k for k in CAPTIONS if k in keys), keys[0] if len(keys) == 1 else None)
        if chosen is None:
            listed = ", ".join(sorted({k for v in values for k in v})[:12])
            return f"JSON objects; a text view reads one of their keys by `key: KEY`, of {listed}"
        outcome = of_texts([v[chosen] for v in values if isinstance(v.get(chosen), str) and v[chosen].strip()], clause)
        return ({**outcome[0], "key": chosen}, *outcome[1:]) if isinstance(outcome, tuple) else outcome
    if all(isinstance(v, list) and v and all(isinstance(x, int | float) for x in v) for v in values):
        return of_arrays([facts_of(np.asarray(v, np.float64)) for v in values], clause, from_json=True)
    return f"JSON, {type(values[0]).__name__} in the first sample: neither objects with text nor lists of numbers"


def array(found: Raws) -> Outcome:
    facts, clause = measure(found, lambda raw: facts_of(np.load(io.BytesIO(raw), allow_pickle=False)))
    return of_arrays(facts, clause) if facts else clause


def facts_of(x: np.ndarray) -> Facts:
    """ValueError: entries that are not finite, since no view would take the array."""
    if x.dtype.kind not in "biuf" or not x.size:
        return Facts(x.shape, x.dtype.kind, None, 0.0, 0.0)
    values = x.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"NaN or infinite numbers in an array of shape {x.shape}")
    flat = values.reshape(-1) if x.size <= LARGEST else None
    return Facts(x.shape, x.dtype.kind, flat, float(values.mean()), float(np.square(values).mean()))


def of_arrays(facts: Sequence[Facts], clause: str, from_json: bool = False) -> Outcome:
    """Arrays of one small shape are vectors; of two axes, one of them fixed and the other longer, series."""
    shapes = [f.shape for f in facts]
    listed = ", ".join("x".join(map(str, s)) or "scalar" for s in list(dict.fromkeys(shapes))[:3])
    if any(f.kind not in "biuf" for f in facts):
        return f"arrays of a type that is not real numbers, of shape {listed}"
    ranks = {len(s) for s in shapes}
    if ranks in ({1}, {2}) and not from_json and (axis := channel_axis(shapes)) is not None:
        return series(facts, axis, clause)
    if len(set(shapes)) == 1 and ranks != {0} and facts[0].flat is not None and facts[0].flat.size:
        return vector(facts, clause)
    return f"arrays of shape {listed}: neither one small shape (a vector) nor channels over time (a series)"


def channel_axis(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The axis of the channels where arrays are series, -1 where there is one channel; None where they are not."""
    sizes = [set(axis) for axis in zip(*shapes)]
    fixed = [len(s) == 1 for s in sizes]
    if len(sizes) == 1:
        return None if fixed[0] and max(sizes[0]) <= LARGEST else -1
    if fixed[0] != fixed[1]:
        return fixed.index(True)
    if not all(fixed):
        return None
    short, long = sorted(shapes[0])
    return shapes[0].index(short) if long >= 4 * short > 0 else None


def series(facts: Sequence[Facts], axis: int, clause: str) -> Outcome:
    channels = 1 if axis < 0 else facts[0].shape[axis]
    steps = [f.shape[0] if axis < 0 else f.shape[1 - axis] for f in facts]
    length = min(LARGEST, max(steps))
    if not channels or not length:
        return "empty arrays"
    settings = {"kind": "series", "channels": channels, "length": length}
    settings |= ({"time_first": True} if axis == 1 else {}) | {"augment": {"jitter": 0.05}}
    spread = math.sqrt(
        max(0.0, float(np.mean([f.square for f in facts])) - float(np.mean([f.mean for f in facts])) ** 2)
    )
    numbers = f"mean {np.mean([f.mean for f in facts]):.4g}, deviation {spread:.4g}"
    measured = f"{channels} channel{'s' * (channels > 1)}, {span(steps)} steps, {numbers}{clause}"
    return settings, series_encoder(channels, length), measured


def series_encoder(channels: int, steps: int) -> dict[str, Any]:
    """A small one, with convolutions that leave a transformer at most 256 positions."""
    strides = [2] * max(0, math.ceil(math.log2(steps / 256))) or [1]
    return {"kind": "series", "channels": channels, "strides": strides, "width": 64, "depth": 2, "heads": 4}


def vector(facts: Sequence[Facts], clause: str) -> Outcome:
    x = np.stack([f.flat for f in facts if f.flat is not None])
    dim, deviations = x.shape[1], x.std(axis=0)
    varied = deviations[deviations > 0]
    ratio = float(varied.max() / varied.min()) if len(varied) else 1.0
    each = ratio > 3 and dim <= 64
    mean = rounded(x.mean(axis=0)) if each else rounded([x.mean()])[0]
    std = rounded(np.where(deviations > 0, deviations, 1)) if each else rounded([x.std() or 1])[0]
    settings = {"kind": "vector", "dim": dim, "mean": mean, "std": std, "augment": {"noise": 0.1}}
    shape = "x".join(map(str, facts[0].shape))
    scales = f", features' deviations differ by a factor of {ratio:.3g}" if ratio > 3 else ""
    measured = f"shape {shape}, {x.min():.4g} to {x.max():.4g}{scales}{clause}"
    return settings, {"kind": "mlp", "input": dim, "width": 128, "depth": 2}, measured


def span(values: Sequence[float], form: str = ",") -> str:
    """The range of the values, or the value where they are all alike."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def rounded(values: Any) -> list[float]:
    """To four digits; never to zero what is not, since deviations must stay above it."""
    return [float(f"{v:.4g}") for v in np.asarray(values, np.float64).tolist()]


# By kind of field; see `KIND_OF` in guess.py.
VIEWS: Mapping[str, Callable[[Raws], Outcome]] = {
    "image": image,
    "audio": audio,
    "text": text,
    "json": from_json,
    "array": array,
}

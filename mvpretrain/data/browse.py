"""A look at samples: all fields of some samples side by side, as a web page or as a picture."""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mvpretrain.data.sources.shards import Tars
from mvpretrain.shards.check import Audio, decoder
from mvpretrain.shards.index import Index
from mvpretrain.views.audio import power_spectrogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIME = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}
MIME |= {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "mp3": "audio/mpeg", "opus": "audio/ogg"}
WINDOW = 256  # samples of a spectrogram's frame


class ShownSample(NamedTuple):
    """One sample and where it comes from; `values` are decoded fields, or the error that decoding met."""

    key: str
    id: int
    shard: str
    raws: dict[str, bytes]
    values: dict[str, Any]


def show(urls: str | Sequence[str], out: str | Path, count: int = 24, seed: int = 0, cache: Path | None = None) -> Path:
    """`count` samples drawn by `seed`, in shard order, as a self-contained .html page or a .png contact sheet.

    Returns the path. ValueError: another ending of `out`, a count below 1, no samples.
    """
    out = Path(out)
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"{out.name!r} ends in {out.suffix!r}; write a page to NAME.html or a picture to NAME.png")
    if count < 1:
        raise ValueError(f"count is {count}, at least 1 sample is shown")
    samples = choose_samples(Index.find(urls, cache), count, seed, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        out.write_text(page(samples), encoding="utf-8")
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing from font"
            )  # scripts that matplotlib has no font for
            sheet(samples).savefig(out, dpi=100)
    return out


def choose_samples(index: Index, count: int, seed: int, cache: Path | None) -> list[ShownSample]:
    tars = Tars(index, cache=cache)
    rows = np.random.default_rng(seed).permutation(len(index))[:count]
    shown = []
    for row in sorted(rows.tolist()):
        sample = tars.read(row)
        values = {field: decoded(field, raw) for field, raw in sample.fields.items()}
        shown.append(ShownSample(sample.key, sample.id, Path(tars.url(row)).name, sample.fields, values))
    return shown


def decoded(field: str, raw: bytes) -> Any:
    """The value by the field's ending; text or a byte count where the ending is unknown, the error where it fails."""
    try:
        decode = decoder(field)
        return decode(raw) if decode else raw.decode()
    except UnicodeDecodeError:
        return f"{len(raw):,} bytes"
    except Exception as error:  # a sample that cannot be decoded is shown as such, whatever its library raises
        return error


def columns(samples: Sequence[ShownSample]) -> list[str]:
    """The fields that get a column of their own; integers stand with the key, see `about`."""
    return sorted({f for sample in samples for f, value in sample.values.items() if not isinstance(value, int)})


def about(sample: ShownSample) -> list[str]:
    """Lines that say which sample this is."""
    numbers = [f"{field} {value}" for field, value in sample.values.items() if isinstance(value, int)]
    return [*numbers, f"id {sample.id}", sample.shard]


# The page


def page(samples: Sequence[ShownSample]) -> str:
    fields = columns(samples)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("sample", *fields))
    body = "\n".join(table_row(sample, fields) for sample in samples)
    title = f"{len(samples)} samples, {len(fields)} fields"
    return PAGE.format(title=title, head=head, body=body)


def table_row(sample: ShownSample, fields: Sequence[str]) -> str:
    first = f"<b>{html.escape(sample.key)}</b>" + "".join(f"<small>{html.escape(s)}</small>" for s in about(sample))
    cells = [cell(f, sample.raws[f], sample.values[f]) if f in sample.raws else "<i>absent</i>" for f in fields]
    return "<tr>" + "".join(f"<td>{c}</td>" for c in (first, *cells)) + "</tr>"


def cell(field: str, raw: bytes, value: Any) -> str:
    """One field as HTML."""
    note = f"<small>{html.escape(described(value))}</small>"
    if isinstance(value, Image.Image):
        return f'<img src="{picture_url(field, raw, value)}" alt="">{note}'
    if isinstance(value, Audio):
        url = data_url(MIME[field.rpartition(".")[2]], raw)
        return f'<audio controls preload="none" src="{url}"></audio><img class="plot" src="{plot(value)}" alt="">{note}'
    if isinstance(value, np.ndarray) and value.size > 1 and value.dtype.kind in "biufc":
        return f'<img class="plot" src="{plot(value)}" alt="">{note}'
    if isinstance(value, Exception):
        return f"<em>{note}</em>"
    return f"<p>{html.escape(plain(value))}</p>"


def picture_url(field: str, raw: bytes, picture: Image.Image) -> str:
    """The field's own bytes where browsers know the format, else the picture as PNG."""
    if picture.format in ("JPEG", "PNG", "WEBP", "GIF"):
        return data_url(f"image/{picture.format.lower()}", raw)
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    return data_url("image/png", stream.getvalue())


def data_url(mime: str, raw: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


def plot(value: Any) -> str:
    """A drawing of sound or an array as a data url."""
    figure = blank_figure(2.8, 1.8)
    draw(figure.add_axes((0.14, 0.16, 0.84, 0.8)), value)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return data_url("image/png", stream.getvalue())


# The contact sheet


def sheet(samples: Sequence[ShownSample]) -> Figure:
    """One row a sample, its fields side by side; several such blocks beside one another where fields are few."""
    fields = columns(samples)
    wide = len(fields) + 1
    rows = -(-len(samples) // max(1, 9 // wide))
    blocks = -(-len(samples) // rows)
    width, height = 2.1 * wide * blocks, 1.8 * rows + 0.4
    figure = blank_figure(width, height)
    spacing = {"left": 0.1 / width, "right": 1 - 0.1 / width, "bottom": 0.25 / height, "top": 1 - 0.35 / height}
    grid = figure.subplots(rows, wide * blocks, squeeze=False, gridspec_kw=spacing | {"wspace": 0.22, "hspace": 0.25})
    for axes in grid.flat:
        axes.axis("off")
    for number, sample in enumerate(samples):
        line = grid[number % rows, number // rows * wide :][:wide]
        write_text(line[0], "\n".join([sample.key, *about(sample)]))
        for axes, field in zip(line[1:], fields):
            if number % rows == 0:
                axes.set_title(field, fontsize=10, fontweight="bold", parse_math=False)
            draw(axes, sample.values.get(field, "absent"))
    return figure


def blank_figure(width: float, height: float) -> Figure:
    """A figure, in inches, that no window system knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def draw(axes: Axes, value: Any) -> None:
    """A value in one set of axes."""
    axes.axis("off")
    if isinstance(value, Image.Image):
        axes.imshow(np.asarray(value.convert("RGB")))
        axes.set_anchor("N")
    elif isinstance(value, Audio):
        draw_sound(axes, value)
    elif isinstance(value, np.ndarray) and value.size > 1 and value.dtype.kind in "biufc":
        draw_array(axes, value)
    else:
        write_text(axes, described(value) if isinstance(value, Exception) else plain(value))


def draw_sound(axes: Axes, sound: Audio) -> None:
    """The waveform above its spectrogram of about a thousand frames, in decibels down to 60 below the loudest."""
    wave, seconds = sound.wave.mean(axis=1), len(sound.wave) / sound.rate
    above, below = axes.inset_axes((0, 0.7, 1, 0.3)), axes.inset_axes((0, 0, 1, 0.66))
    step = -(-len(wave) // 20_000)
    above.plot(np.arange(len(wave))[::step] / sound.rate, wave[::step], linewidth=0.5)
    above.set_xlim(0, seconds)
    above.axis("off")
    hop = max(WINDOW // 4, len(wave) // 1000)
    power = power_spectrogram(torch.from_numpy(wave), WINDOW, WINDOW, hop).numpy()
    loudest = max(float(power.max()), 1e-12)
    decibels = 10 * np.log10(np.maximum(power, 1e-6 * loudest) / loudest)
    below.imshow(decibels, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, sound.rate / 2000))
    below.tick_params(labelsize=6, pad=1)
    below.set_ylabel("kHz", fontsize=6, labelpad=1)
    below.set_xlabel("s", fontsize=6, labelpad=0, loc="right")


def draw_array(axes: Axes, array: np.ndarray) -> None:
    """One dimension as a line, few long channels as lines above one another, else a heat map of the first slice."""
    array = np.abs(array) if array.dtype.kind == "c" else array.squeeze()
    while array.ndim > 2:
        array = array[0]
    axes.axis("on")
    axes.tick_params(labelsize=6, pad=1)
    if array.ndim == 2 and (max(array.shape) < 4 * min(array.shape) or min(array.shape) > 16):
        axes.imshow(array, aspect="auto", interpolation="nearest")
        return
    channels = np.atleast_2d(array) if array.ndim == 1 or len(array) <= 16 else array.T
    step = 1.1 * max(float(np.nanmax(channels) - np.nanmin(channels)), 1e-12) if len(channels) > 1 else 0
    for number, channel in enumerate(channels):
        axes.plot(channel.astype(float) - number * step, ".-" if len(channel) < 32 else "-", linewidth=0.7)
    if step:
        axes.set_yticks([])


def write_text(axes: Axes, text: str) -> None:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 28) or [""]]
    lines = lines if len(lines) <= 11 else [*lines[:10], "..."]
    axes.text(0, 0.98, "\n".join(lines), fontsize=8, va="top", transform=axes.transAxes, parse_math=False)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=described)


def described(value: Any) -> str:
    """Size and type of a value in a few words."""
    if isinstance(value, Image.Image):
        return f"{value.width} x {value.height} {value.mode}"
    if isinstance(value, Audio):
        channels = value.wave.shape[1]
        return f"{len(value.wave) / value.rate:.2f} s, {value.rate:,} Hz, {channels} channel{'s' * (channels > 1)}"
    if isinstance(value, np.ndarray):
        return f"{' x '.join(map(str, value.shape)) or 'scalar'} {value.dtype}"
    if isinstance(value, Exception):
        return f"does not decode: {type(value).__name__}: {value}"
    return ""


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; margin: 1.5rem; }}
table {{ border-collapse: collapse; }}
th {{ position: sticky; top: 0; background: #eee; text-align: left; }}
th, td {{ border: 1px solid #ccc; padding: 0.5rem; vertical-align: top; }}
td {{ max-width: 24rem; overflow-wrap: anywhere; }}
td > * {{ display: block; margin: 0 0 0.3rem; }}
td p {{ white-space: pre-wrap; min-width: 8rem; max-height: 20rem; overflow-y: auto; }}
img {{ min-width: 96px; max-width: 20rem; max-height: 16rem; image-rendering: pixelated; }}
img.plot {{ image-rendering: auto; }}
audio {{ width: 16rem; }}
small, i {{ color: #666; font-style: normal; font-size: 12px; }}
em small {{ color: #b00020; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</body>
</html>
"""

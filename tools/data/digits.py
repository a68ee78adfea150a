"""scikit-learn's 1,797 scanned digits as shards with three views: scan, Fourier magnitudes, caption.

    python -m tools.data.digits OUT

Fields: `png`, the 8 x 8 grey scan; `npy`, log(1 + |FFT2|) of it with the zero frequency in the middle, 8 x 8 float32;
`txt`, a caption in one of five languages, drawn for each sample from the templates below; `cls`, the digit.
A fifth of the samples is held out as `test`, stratified by digit.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mvpretrain.shards.pack import write_splits

# language: words for 0 to 9, and sentences about one of them
LANGUAGES = {
    "en": (
        "zero one two three four five six seven eight nine",
        ("the digit {}, written by hand", "a scan of the number {}", "someone wrote down {}", "a small grey {}"),
    ),
    "de": (
        "Null Eins Zwei Drei Vier Fünf Sechs Sieben Acht Neun",
        ("die Ziffer {}, von Hand geschrieben", "ein Bild der {}", "jemand schrieb eine {}", "eine kleine graue {}"),
    ),
    "fr": (
        "zéro un deux trois quatre cinq six sept huit neuf",
        ("le chiffre {} écrit à la main", "une image du nombre {}", "quelqu'un a noté un {}", "un petit {} gris"),
    ),
    "es": (
        "cero uno dos tres cuatro cinco seis siete ocho nueve",
        ("el dígito {} escrito a mano", "una imagen del número {}", "alguien anotó un {}", "un pequeño {} gris"),
    ),
    "pl": (
        "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć",
        ("cyfra {} napisana ręcznie", "obraz liczby {}", "ktoś zapisał cyfrę {}", "mała szara cyfra {}"),
    ),
}


def caption(digit: int, rng: np.random.Generator) -> str:
    """A sentence about a digit, its language and template drawn uniformly."""
    words, templates = LANGUAGES[str(rng.choice(list(LANGUAGES)))]
    return str(rng.choice(templates)).format(words.split()[digit])


def png(pixels: np.ndarray) -> bytes:
    """A grey image, `height width` of 8-bit integers, as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def split(labels: np.ndarray, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """The rows of four fifths of every class, and of the other fifth, each shuffled."""
    rows = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    test = np.concatenate([p[: round(len(p) / 5)] for p in rows])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return rng.permutation(train).tolist(), rng.permutation(test).tolist()


def samples(digits: Any, rows: Iterable[int], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for row in rows:
        scan, digit = digits.images[row], int(digits.target[row])
        yield {
            "__key__": f"digit-{row:05d}",
            "png": png(np.round(scan * (255 / 16)).astype(np.uint8)),
            "npy": np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(scan)))).astype(np.float32),
            "txt": caption(digit, rng),
            "cls": digit,
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    digits: Any = load_digits()
    rng = np.random.default_rng(args.seed)
    train, test = split(digits.target, rng)
    splits = {"train": samples(digits, train, rng), "test": samples(digits, test, rng)}
    for name, written in write_splits(args.out, splits, shard_samples=300).items():
        print(f"{name}: {written}")


if __name__ == "__main__":
    main()

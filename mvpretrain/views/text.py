"""Text: UTF-8 bytes or strings, or a key of a JSON object, to token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from mvpretrain.config import unknown
from mvpretrain.types import View
from mvpretrain.views import ViewConfig

BEGIN, END = 257, 258  # of the bytes tokenizer; END is the largest id, which CLIP's towers look for


class TextConfig(ViewConfig):
    """`length` is the number of tokens, begin and end included; longer text is cut and keeps its end token.

    `tokenizer` is `bytes` (a byte is its value + 1, padding 0, begin 257, end 258), `openclip:MODEL` (CLIP's BPE as
    that model uses it), or `huggingface:FOLDER` (a folder with tokenizer files). `key` picks from JSON: `caption`,
    or a path such as `meta.captions.0`. Of several texts, a JSON list or with `lines: true` the lines that are not
    empty, training draws one and evaluation takes the first.
    """

    kind: Literal["text"] = "text"
    field: str = "txt"
    tokenizer: str = "bytes"
    length: int = Field(default=77, ge=3)
    key: str | None = None
    lines: bool = False

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"length": 64}, {"length": 16, "field": "json", "key": "captions.0"}]

    @field_validator("tokenizer")
    @classmethod
    def _known(cls, value: str) -> str:
        scheme, _, name = value.partition(":")
        if value != "bytes" and not (scheme in ("openclip", "huggingface") and name):
            raise ValueError(unknown("tokenizer", value, ["bytes", "openclip:MODEL", "huggingface:FOLDER"]))
        return value

    def build(self, train: bool) -> TextTransform:
        return TextTransform(self, train)

    def vocabulary(self) -> int:
        """The number of ids that the tokenizer may give, for the encoder's table."""
        return load_tokenizer(self.tokenizer).vocabulary

    def sketch(self, latent: np.ndarray) -> str | dict[str, Any]:
        """One syllable a coordinate: the consonant tells which, the vowel its value in five steps."""
        steps = np.digitize(latent, [-1.0, -0.3, 0.3, 1.0])
        letters = "bdfghjklmnprstvwz"
        text = " ".join(
            letters[i % len(letters)] * (1 + i // len(letters)) + "aeiou"[step] for i, step in enumerate(steps)
        )
        if self.key is None:
            return text
        nested: Any = text
        for part in reversed(self.key.split(".")):
            nested = [nested] * (int(part) + 1) if part.isdigit() else {part: nested}
        return nested

    def portable(self, folder: Path) -> TextConfig:
        """Tokenizer files of Hugging Face go to a folder of their own in `folder`; the others need no file."""
        scheme, _, source = self.tokenizer.partition(":")
        if scheme != "huggingface":
            return self
        target = folder / f"tokenizer-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        auto_tokenizer(source).save_pretrained(target)
        return self.model_copy(update={"tokenizer": f"huggingface:{target}"})


class Tokenizer(NamedTuple):
    encode: Callable[[str, int], list[int]]  # text and length to ids, special ones included, at most length
    pad: int
    vocabulary: int


class TextTransform:
    """Text to `length` int64 ids; the mask is True on tokens, begin and end included."""

    def __init__(self, config: TextConfig, train: bool):
        self.config, self.train = config, train
        self.tokenizer = load_tokenizer(config.tokenizer)

    def __call__(self, raw: Any) -> View:
        texts = candidates(raw, self.config.key, self.config.lines)
        chosen = int(torch.randint(len(texts), ())) if self.train and len(texts) > 1 else 0
        ids = self.tokenizer.encode(texts[chosen], self.config.length)
        if not ids:
            raise ValueError(f"{self.config.tokenizer} makes no token of the text {texts[chosen]!r:.80}")
        return self.item(ids)

    def blank(self) -> View:
        return self.item([self.tokenizer.pad])

    def item(self, ids: list[int]) -> View:
        data = torch.full((self.config.length,), self.tokenizer.pad, dtype=torch.int64)
        data[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask: Tensor = torch.arange(self.config.length) < len(ids)
        return View(data, mask)


def candidates(raw: Any, key: str | None, lines: bool) -> list[str]:
    """The texts to choose from, at least one, none of them empty. ValueError: no text, or not UTF-8."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        try:
            raw = bytes(raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is not UTF-8: {error}; convert it when packing") from error
    found = raw if key is None else pick(raw, key)
    if isinstance(found, str):
        found = found.splitlines() if lines else [found]
    if not isinstance(found, (list, tuple)) or not all(isinstance(t, str) for t in found):
        raise ValueError(f"text is a string or a list of strings, got {found!r:.80}")
    texts = [t.strip() for t in found if t.strip()]
    if not texts:
        raise ValueError(f"the text is empty: {raw!r:.80}")
    return texts


def pick(raw: Any, key: str) -> Any:
    """The value at a dotted path in a JSON object, or in text that holds one."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"key {key!r} picks from JSON, and this is none: {raw!r:.80} ({error})") from error
    found = raw
    for part in key.split("."):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            known = [str(k) for k in found] if isinstance(found, dict) else [f"a {type(found).__name__}"]
            raise ValueError(f"key {key!r}: {unknown('key', part, known)}")
    return found


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name, from files that are already here."""
    scheme, _, source = name.partition(":")
    if scheme == "openclip":
        return openclip_tokenizer(source)
    if scheme == "huggingface":
        return huggingface_tokenizer(source)
    return Tokenizer(encode_bytes, pad=0, vocabulary=259)


def encode_bytes(text: str, length: int) -> list[int]:
    """Written out and not a library's, so that a text view needs no vocabulary file and no further package."""
    return [BEGIN, *(byte + 1 for byte in text.encode("utf-8")[: length - 2]), END]


def openclip_tokenizer(model: str) -> Tokenizer:
    """CLIP's byte-pair encoding, whose table is in open_clip's package. ValueError: unknown, or on a hub only."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(unknown("open_clip model", model, open_clip.list_models()))
    if config.get("text_cfg", {}).get("hf_tokenizer_name") or "siglip" in model.lower():
        raise ValueError(
            f"the tokenizer of open_clip's {model!r} is on a hub and nothing is downloaded here; save it to a folder "
            "and write tokenizer: huggingface:FOLDER"
        )
    bpe: Any = open_clip.get_tokenizer(model)
    return Tokenizer(OpenClipEncode(bpe), pad=0, vocabulary=bpe.vocab_size)


class OpenClipEncode:
    """A class and not a closure, so that workers may be spawned."""

    def __init__(self, bpe: Any):
        self.bpe = bpe

    def __call__(self, text: str, length: int) -> list[int]:
        return [self.bpe.sot_token_id, *self.bpe.encode(text)[: length - 2], self.bpe.eot_token_id]


def huggingface_tokenizer(folder: str) -> Tokenizer:
    tokenizer = auto_tokenizer(folder)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    return Tokenizer(HuggingFaceEncode(tokenizer), pad=pad, vocabulary=len(tokenizer))


class HuggingFaceEncode:
    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, text: str, length: int) -> list[int]:
        return self.tokenizer(text, truncation=True, max_length=length)["input_ids"]


def auto_tokenizer(folder: str) -> Any:
    """ValueError: no such folder, no tokenizer in it, or transformers is not installed."""
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"tokenizer huggingface:{folder}: no such folder; save the tokenizer and give its folder")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError("tokenizer huggingface:FOLDER needs transformers; pip install 'mvpretrain[text]'") from error
    try:
        return AutoTokenizer.from_pretrained(
            str(Path(folder).expanduser()), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer huggingface:{folder}: the folder holds no tokenizer: {error}") from error

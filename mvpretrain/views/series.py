"""Series of several channels (leads of an ECG, sensors): npy, npz, torch bytes or arrays to `length channels`."""

from __future__ import annotations

import io
import zipfile
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from mvpretrain.config import Config
from mvpretrain.types import View
from mvpretrain.views import ViewConfig, mixing, piece


class Augment(Config):
    """Random changes when training, in this order.

    `crop` keeps a run of a random share of the steps, at least this one (the rest is masked); `scaling` multiplies each
    channel by a factor of mean 1 and this deviation, `jitter` adds Gaussian noise of this deviation (both as in Um et
    al. 2017, in units of what `standardize` gives); `channel_dropout` sets channels to 0, never all of them.
    """

    crop: float = Field(default=1.0, gt=0, le=1)
    scaling: float = Field(default=0.0, ge=0)
    jitter: float = Field(default=0.0, ge=0)
    channel_dropout: float = Field(default=0.0, ge=0, lt=1)


class SeriesConfig(ViewConfig):
    """The field is an array `channels steps` (`time_first: true`: `steps channels`), cut or padded to `length` steps.

    `select` lists the channels to use, from 0, so that twelve leads of one field can be twelve views. `key` names the
    array in an npz file with several, or in a saved dict. `standardize` brings each channel to mean 0 and deviation 1
    over the steps that are used; a constant channel becomes 0.
    """

    kind: Literal["series"] = "series"
    field: str = "npy;npz;pth"
    channels: int = Field(gt=0)
    length: int = Field(gt=0)
    select: tuple[int, ...] | None = None
    key: str | None = None
    time_first: bool = False
    standardize: bool = True
    augment: Augment = Augment()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"channels": 3, "length": 80},
            {"channels": 3, "length": 40, "select": (2,), "time_first": True, "key": "x"},
        ]

    @model_validator(mode="after")
    def _channels_exist(self) -> SeriesConfig:
        wrong = [c for c in self.select or () if not 0 <= c < self.channels]
        if wrong or self.select == ():
            raise ValueError(f"select {self.select} must name channels between 0 and {self.channels - 1}, at least one")
        return self

    def build(self, train: bool) -> SeriesTransform:
        return SeriesTransform(self, train)

    def sketch(self, latent: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        """Eight sines of 1 to 8 periods in each channel, their amplitudes a linear map of the latent."""
        amplitude = rearrange(mixing(8 * self.channels, latent), "(c f) -> c f", f=8)
        phase = rearrange(np.arange(8 * self.channels, dtype=np.float64), "(c f) -> c f 1", f=8)
        turns = np.outer(np.arange(1, 9), np.arange(self.length) / self.length)
        series = np.einsum("cf,cft->ct", amplitude, np.sin(2 * np.pi * turns + phase)).astype(np.float32)
        series = np.ascontiguousarray(series.T) if self.time_first else series
        return series if self.key is None else {self.key: series}


class SeriesTransform:
    """An array to `length channels`, float32, time first; the mask is True on steps that were there.

    A longer series gives a random piece in training and its start in evaluation. Masked steps are 0.
    """

    def __init__(self, config: SeriesConfig, train: bool):
        self.config, self.train = config, train
        self.channels = list(range(config.channels) if config.select is None else config.select)

    def __call__(self, raw: Any) -> View:
        c = self.config
        steps = array(raw, c)[:, self.channels]
        if self.train and c.augment.crop < 1:
            longest = min(len(steps), c.length)
            keep = int(torch.randint(max(1, round(c.augment.crop * longest)), longest + 1, ()))
            steps, _ = piece(steps, keep, self.train)
        x, mask = piece(steps, c.length, self.train)
        assert mask is not None
        x = standardized(x, mask) if c.standardize else x
        x = augmented(x, c.augment) if self.train else x
        return View(x * mask[:, None], mask)

    def blank(self) -> View:
        return View(torch.zeros(self.config.length, len(self.channels)), torch.arange(self.config.length) < 1)


def array(raw: Any, config: SeriesConfig) -> Float[Tensor, "steps channels"]:
    """The field's array, time first. ValueError: unreadable, another number of channels, or not all finite."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        raw = decode(bytes(raw))
    if isinstance(raw, dict):
        key = next(iter(raw), None) if config.key is None and len(raw) == 1 else config.key
        if key not in raw:
            raise ValueError(f"the field holds arrays named {list(raw)} and key is {key!r}; set key to one of them")
        raw = raw[key]
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            found = np.asarray(raw, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a series is an array of numbers, got {type(raw).__name__}") from error
    if found.ndim == 1 and config.channels == 1:
        found = found[:, None]
    elif found.ndim == 2 and not config.time_first:
        found = found.T
    if found.ndim != 2 or found.shape[1] != config.channels or len(found) == 0:
        order = "steps channels" if config.time_first else "channels steps"
        raise ValueError(
            f"the series has shape {np.shape(raw)}, needed is `{order}` with channels: {config.channels}; "
            "set channels, or time_first to the other order"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"the series of shape {np.shape(raw)} has NaN or infinite values; fill them when packing")
    return torch.from_numpy(found.copy())


def decode(raw: bytes) -> Any:
    """npy, npz (a dict) or what torch.save wrote, recognised by content; nothing that could run code is unpickled."""
    try:
        if raw.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(raw), allow_pickle=False)
        if raw.startswith(b"PK") and any(n.endswith(".npy") for n in zipfile.ZipFile(io.BytesIO(raw)).namelist()):
            return dict(np.load(io.BytesIO(raw), allow_pickle=False))
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{len(raw)} bytes starting with {raw[:8]!r} are not npy, npz or torch: {error}") from error


def standardized(x: Float[Tensor, "steps channels"], mask: Bool[Tensor, " steps"]) -> Float[Tensor, "steps channels"]:
    deviation, mean = torch.std_mean(x[mask], dim=0, correction=0)
    # A channel that varies by no more than float32's rounding of its mean is constant.
    return (x - mean) / deviation.masked_fill(deviation <= 1e-6 * mean.abs(), torch.inf)


def augmented(x: Float[Tensor, "steps channels"], augment: Augment) -> Float[Tensor, "steps channels"]:
    channels = x.shape[1]
    if augment.scaling:
        x = x * (1 + augment.scaling * torch.randn(channels))
    if augment.jitter:
        x = x + augment.jitter * torch.randn_like(x)
    if augment.channel_dropout:
        keep = torch.rand(channels) >= augment.channel_dropout
        keep[torch.randint(channels, ())] |= not keep.any()
        x = x * keep
    return x

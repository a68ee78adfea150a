"""Sound: wav, flac, mp3 or ogg bytes, or a waveform with its rate, to log-mel frames."""

from __future__ import annotations

import io
import math
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


class Normalization(Config):
    """Subtract `mean` and divide by `std`, in units of log power."""

    mean: float
    std: float = Field(gt=0)


class Augment(Config):
    """Random changes when training: masks of SpecAugment (Park et al. 2019), and the loudness.

    `gain` is the largest change in decibels, up or down. Each of `time_masks` sets up to the share `time_width` of the
    clip's frames to the clip's mean, each of `frequency_masks` up to the share `frequency_width` of the mel bands.
    `specaugment` has two of each, with their 27 of 80 bands and at most a fifth of the frames.
    """

    gain: float = Field(default=0.0, ge=0)
    time_masks: int = Field(default=0, ge=0)
    time_width: float = Field(default=0.2, gt=0, le=1)
    frequency_masks: int = Field(default=0, ge=0)
    frequency_width: float = Field(default=27 / 80, gt=0, le=1)


class AudioConfig(ViewConfig):
    """`seconds` of mono sound at `rate` samples a second; other rates are resampled, channels averaged.

    Frame t is centred on sample `t hop`, silence around the clip: a clip of n samples has 1 + n // hop frames. Under a
    periodic Hann window of `window` samples (`n_fft` at least as long, by default the same) the power spectrum is
    summed into `mels` triangles between `low` and `high` Hz (default: half the rate). `scale: htk` has triangles of
    height 1 on O'Shaughnessy's scale, `slaney` triangles of area 2 on Slaney's: the defaults of torchaudio and of
    librosa. The value is ln(power + 1e-6); `normalize: item` brings each clip to mean 0 and deviation 1.
    """

    kind: Literal["audio"] = "audio"
    field: str = "wav;flac;mp3;ogg"
    rate: int = Field(default=16000, gt=0)
    seconds: float = Field(default=5.0, gt=0)
    window: int = Field(default=400, gt=1)
    hop: int = Field(default=160, gt=0)
    n_fft: int | None = None
    mels: int = Field(default=64, gt=0)
    low: float = Field(default=0.0, ge=0)
    high: float | None = None
    scale: Literal["htk", "slaney"] = "htk"
    normalize: Literal["item", "none"] | Normalization = "item"
    augment: Literal["none", "specaugment"] | Augment = "none"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"rate": 8000, "seconds": 0.2, "window": 256, "mels": 32},
            {"rate": 8000, "seconds": 0.2, "window": 256, "mels": 32, "augment": "specaugment", "normalize": "none"},
        ]

    @model_validator(mode="after")
    def _spectrum_is_possible(self) -> AudioConfig:
        if self.fft < self.window:
            raise ValueError(f"n_fft {self.fft} is shorter than window {self.window}; make it at least as long")
        if not self.low < self.top <= self.rate / 2:
            raise ValueError(f"needs low < high <= rate / 2, got low={self.low} high={self.top} rate={self.rate}")
        if self.samples < 1:
            raise ValueError(f"seconds {self.seconds} at rate {self.rate} is less than one sample")
        empty = int((self.filters().sum(dim=0) == 0).sum())
        if empty:
            raise ValueError(f"{empty} of {self.mels} mel bands hold no frequency of n_fft {self.fft}; lower mels")
        return self

    @property
    def fft(self) -> int:
        return self.window if self.n_fft is None else self.n_fft

    @property
    def top(self) -> float:
        return self.rate / 2 if self.high is None else self.high

    @property
    def samples(self) -> int:
        return round(self.seconds * self.rate)

    @property
    def frames(self) -> int:
        return 1 + self.samples // self.hop

    def filters(self) -> Float[Tensor, "frequencies mels"]:
        return mel_filters(self.rate, self.fft, self.mels, self.low, self.top, self.scale)

    def build(self, train: bool) -> AudioTransform:
        return AudioTransform(self, train)

    def sketch(self, latent: np.ndarray) -> tuple[np.ndarray, int]:
        """(waveform, rate): sixteen sines from 5 to 80 % of the highest frequency, as loud as the latent makes them."""
        time = np.arange(self.samples) / self.rate
        hertz = np.geomspace(0.05, 0.8, 16) * self.top
        loud = np.exp(mixing(16, latent)) / 64
        return (loud @ np.sin(2 * np.pi * np.outer(hertz, time))).astype(np.float32), self.rate


class AudioTransform:
    """Sound to `frames mels`, float32, time first; the mask is True on frames centred in the clip.

    A longer recording gives a random piece in training and its start in evaluation. Masked frames are 0.
    """

    def __init__(self, config: AudioConfig, train: bool):
        self.config, self.train = config, train
        named = {"none": Augment(), "specaugment": Augment(time_masks=2, frequency_masks=2)}
        self.augment = config.augment if isinstance(config.augment, Augment) else named[config.augment]
        self.filters = config.filters()

    def __call__(self, raw: Any) -> View:
        c = self.config
        wave, inside = piece(waveform(raw, c.rate), c.samples, self.train)
        assert inside is not None
        if self.train and self.augment.gain:
            wave = wave * 10 ** (self.augment.gain * float(torch.empty(()).uniform_(-1, 1)) / 20)
        x = (mel_spectrogram(wave, self.filters, c.fft, c.window, c.hop) + 1e-6).log()
        mask = torch.arange(c.frames) < 1 + int(inside.sum()) // c.hop
        x = normalized(x, mask, c.normalize)
        if self.train:
            x = spec_augmented(x, mask, self.augment)
        return View(x * mask[:, None], mask)

    def blank(self) -> View:
        return View(torch.zeros(self.config.frames, self.config.mels), torch.arange(self.config.frames) < 1)


def waveform(raw: Any, rate: int) -> Float[Tensor, " samples"]:
    """Mono float32 at `rate`. ValueError: unreadable or empty sound, or not a waveform with its rate."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        wave, found = decode(bytes(raw))
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        wave, found = np.asarray(raw[0]), int(raw[1])
    else:
        raise ValueError(f"sound is bytes or (waveform, rate), got {type(raw).__name__}")
    if np.issubdtype(wave.dtype, np.signedinteger):
        wave = wave / -float(np.iinfo(wave.dtype).min)
    if wave.ndim not in (1, 2) or wave.size == 0 or (wave.ndim == 2 and wave.shape[0] > wave.shape[1]):
        raise ValueError(f"a waveform is `samples` or `channels samples`, not empty, got {wave.shape}; transpose it")
    if found <= 0 or not np.isfinite(wave).all():
        raise ValueError(f"the waveform has NaN or infinite samples, or no rate (rate {found})")
    wave = wave if wave.ndim == 1 else wave.mean(axis=0)
    return torch.from_numpy(np.ascontiguousarray(resampled(wave.astype(np.float32), found, rate)))


def decode(raw: bytes) -> tuple[np.ndarray, int]:
    """(`channels samples`, rate) by soundfile."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("sound from files needs soundfile; pip install 'mvpretrain[audio]'") from error
    try:
        wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{len(raw)} bytes starting with {raw[:8]!r} cannot be read as sound: {error}") from error
    return rearrange(wave, "samples channels -> channels samples"), rate


def resampled(wave: np.ndarray, found: int, rate: int) -> np.ndarray:
    """Polyphase resampling with scipy's default low-pass filter (Kaiser window, beta 5)."""
    if found == rate:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(found, rate)
    return resample_poly(wave, rate // common, found // common).astype(np.float32)


def mel_spectrogram(
    wave: Float[Tensor, " samples"], filters: Float[Tensor, "frequencies mels"], n_fft: int, window: int, hop: int
) -> Float[Tensor, "frames mels"]:
    """Power in each mel band (see `power_spectrogram`)."""
    return rearrange(power_spectrogram(wave, n_fft, window, hop), "f t -> t f") @ filters


def power_spectrogram(
    wave: Float[Tensor, " samples"], n_fft: int, window: int, hop: int
) -> Float[Tensor, "frequencies frames"]:
    """Power under a periodic Hann window; frames centred on multiples of `hop`, zeros around the clip."""
    hann = torch.hann_window(window)
    spectrum = torch.stft(wave, n_fft, hop, window, hann, center=True, pad_mode="constant", return_complex=True)
    return spectrum.abs().square()


def mel_filters(
    rate: int, n_fft: int, mels: int, low: float, high: float, scale: str
) -> Float[Tensor, "frequencies mels"]:
    """Triangles in equal steps on the mel scale between `low` and `high`; each ends where its neighbours peak."""
    to_mel, to_hertz = (htk_mel, htk_hertz) if scale == "htk" else (slaney_mel, slaney_hertz)
    start, end = to_mel(np.array([low, high]))
    corners = to_hertz(np.linspace(start, end, mels + 2))
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.arange(n_fft // 2 + 1)[:, None] * rate / n_fft
    triangles = np.minimum((hertz - left) / (peak - left), (right - hertz) / (right - peak)).clip(min=0)
    if scale == "slaney":
        triangles = triangles * 2 / (right - left)
    return torch.from_numpy(triangles.astype(np.float32))


def htk_mel(hertz: np.ndarray) -> np.ndarray:
    """2595 log10(1 + f / 700), O'Shaughnessy 1987 and HTK."""
    return 2595 * np.log10(1 + hertz / 700)


def htk_hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def slaney_mel(hertz: np.ndarray) -> np.ndarray:
    """Linear up to 1 kHz (15 mel), then 27 mel for each factor 6.4 (Slaney's Auditory Toolbox, 1998)."""
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def normalized(
    x: Float[Tensor, "frames mels"], mask: Bool[Tensor, " frames"], how: str | Normalization
) -> Float[Tensor, "frames mels"]:
    if isinstance(how, Normalization):
        return (x - how.mean) / how.std
    if how == "none":
        return x
    return (x - x[mask].mean()) / x[mask].std(correction=0).clamp_min(1e-3)


def spec_augmented(
    x: Float[Tensor, "frames mels"], mask: Bool[Tensor, " frames"], augment: Augment
) -> Float[Tensor, "frames mels"]:
    """Bands of time and of frequency set to the clip's mean; a width is uniform from 0 to its share of the clip."""
    fill, frames, mels = x[mask].mean(), int(mask.sum()), x.shape[1]
    for _ in range(augment.time_masks):
        x = torch.where(random_band(frames, augment.time_width, len(x))[:, None], fill, x)
    for _ in range(augment.frequency_masks):
        x = torch.where(random_band(mels, augment.frequency_width, mels), fill, x)
    return x


def random_band(count: int, fraction: float, length: int) -> Bool[Tensor, " length"]:
    """True on a random run among the first `count` of `length`."""
    width = int(torch.randint(int(fraction * count) + 1, ()))
    start = int(torch.randint(count - width + 1, ()))
    where = torch.arange(length)
    return (where >= start) & (where < start + width)

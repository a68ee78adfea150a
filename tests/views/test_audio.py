import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mvpretrain.views.audio import AudioConfig, Augment, Normalization, mel_spectrogram, resampled, waveform

DATA = Path(__file__).parents[3] / "shared/data/fsdd/recordings"
SMALL = {"rate": 8000, "seconds": 0.5, "window": 200, "hop": 80, "n_fft": 256, "mels": 24}


def small(**settings) -> AudioConfig:
    return AudioConfig.model_validate(SMALL | settings)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def reference_mel(hertz: float, scale: str) -> float:
    if scale == "htk":
        return 1127 * math.log(1 + hertz / 700)
    return hertz / (200 / 3) if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)


def reference_spectrogram(wave: np.ndarray, config: AudioConfig) -> np.ndarray:
    """A discrete Fourier transform written out, and triangles bin by bin with corners found by bisection."""
    fft = config.fft
    padded = np.concatenate([np.zeros(fft // 2), wave.astype(np.float64), np.zeros(fft // 2)])
    hann = np.zeros(fft)
    for n in range(config.window):
        hann[(fft - config.window) // 2 + n] = 0.5 - 0.5 * math.cos(2 * math.pi * n / config.window)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(fft // 2 + 1), np.arange(fft)) / fft)
    frames = [padded[s : s + fft] * hann for s in range(0, len(wave) + 1, config.hop)]
    power = np.abs(np.array(frames) @ dft.T) ** 2

    def hertz_of(mel: float) -> float:
        low, high = 0.0, config.rate
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if reference_mel(middle, config.scale) < mel else (low, middle)
        return low

    start, end = reference_mel(config.low, config.scale), reference_mel(config.top, config.scale)
    corners = [hertz_of(start + (end - start) * m / (config.mels + 1)) for m in range(config.mels + 2)]
    result = np.zeros((len(frames), config.mels))
    for m in range(config.mels):
        left, peak, right = corners[m : m + 3]
        for k in range(fft // 2 + 1):
            f = k * config.rate / fft
            weight = (f - left) / (peak - left) if f <= peak else (right - f) / (right - peak)
            height = 2 / (right - left) if config.scale == "slaney" else 1
            result[:, m] += max(0.0, weight) * height * power[:, k]
    return result


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("settings", [{}, {"n_fft": 255, "low": 200.0, "high": 3500.0}])
def test_mel_spectrogram_is_the_slow_one(scale, settings):
    config = small(scale=scale, **settings)
    wave = noise(1203)
    found = mel_spectrogram(torch.from_numpy(wave), config.filters(), config.fft, config.window, config.hop)
    slow = reference_spectrogram(wave, config)
    assert np.allclose(found.numpy(), slow, rtol=1e-3, atol=1e-6 * slow.max())


def test_shapes_masks_and_padding_do_not_depend_on_the_length():
    config = small(normalize="none")
    transform = config.build(train=False)
    for samples in (1, 79, 80, 1203, 4000, 9000):
        item = transform((noise(samples), 8000))
        frames = min(samples, 4000) // 80 + 1
        assert item.data.shape == (51, 24) == (config.frames, config.mels) and item.data.dtype == torch.float32
        assert item.mask is not None and item.mask.tolist() == [t < frames for t in range(51)]
        assert not item.data[frames:].any() and item.data.isfinite().all()
    wave = noise(1203)
    alone = small(normalize="none", seconds=1203 / 8000).build(train=False)((wave, 8000)).data
    assert torch.allclose(transform((wave, 8000)).data[: len(alone)], alone, atol=1e-5)
    assert torch.equal(transform((noise(9000), 8000)).data[:49], transform((noise(9000)[:4000], 8000)).data[:49])


def test_normalisations():
    wave = (noise(1203), 8000)
    item = small().build(train=False)(wave)
    kept = item.data[item.mask]
    assert abs(kept.mean()) < 1e-5 and abs(kept.std(correction=0) - 1) < 1e-5
    raw = small(normalize="none").build(train=False)(wave)
    fixed = small(normalize=Normalization(mean=-4.0, std=2.0)).build(train=False)(wave)
    assert torch.allclose(fixed.data[fixed.mask], (raw.data[raw.mask] + 4) / 2)
    assert not small().build(train=False)((np.zeros(4000), 8000)).data.any()


def test_every_form_of_sound_is_the_same_waveform():
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    wave = np.round(noise(800) * 32768).astype(np.int16)
    stereo = np.stack([wave, np.zeros_like(wave)])
    for form in ("WAV", "FLAC"):
        target = io.BytesIO()
        soundfile.write(target, stereo.T, 8000, format=form, subtype="PCM_16")
        assert torch.equal(waveform(target.getvalue(), 8000), torch.from_numpy(wave / 65536).float())
    assert torch.equal(waveform((stereo, 8000), 8000), torch.from_numpy(wave / 65536).float())
    assert torch.equal(waveform((torch.from_numpy(wave), 8000), 8000), torch.from_numpy(wave / 32768).float())


def test_resampling_keeps_a_tone_and_drops_what_cannot_be():
    def tone(hertz: float, rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)

    found = resampled(tone(440, 11025), 11025, 8000)
    assert len(found) == 8000 and np.abs(found - tone(440, 8000))[200:-200].max() < 5e-3
    assert np.abs(resampled(tone(6000, 16000), 16000, 8000))[200:-200].max() < 5e-3


def test_training_draws_a_piece_and_masks_by_the_seed():
    raw = (noise(9000), 8000)
    plain, masked = small().build(train=True), small(augment="specaugment").build(train=True)
    for transform in (plain, masked, small(augment={"gain": 6.0}, normalize="none").build(train=True)):
        found = [(torch.manual_seed(seed), transform(raw).data)[1] for seed in (0, 0, 1)]
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    evaluation = small(augment="specaugment").build(train=False)
    assert torch.equal(evaluation(raw).data, small().build(train=False)(raw).data)


def test_masks_are_bands_of_the_mean_within_the_clip():
    raw = (noise(2000), 8000)
    plain = small().build(train=False)(raw)
    augment = Augment(time_masks=1, time_width=0.5, frequency_masks=1, frequency_width=0.5)
    transform = small(augment=augment).build(train=True)
    torch.manual_seed(0)
    widths, starts = [], set()
    for _ in range(20):
        item = transform(raw)
        changed = (item.data != plain.data)[:26]
        rows, columns = changed.all(dim=1), changed.all(dim=0)
        assert torch.equal(changed, rows[:, None] | columns) and item.data[:26][changed].abs().max() < 1e-5
        assert not item.data[26:].any() and rows.sum() <= 13 and columns.sum() <= 12
        assert all((run.int().diff() == 1).sum() + run[0].int() <= 1 for run in (rows, columns))
        widths.append(int(rows.sum()))
        starts.add(int(rows.int().argmax()))
    assert max(widths) > 8 and min(widths) < 4 and len(starts) > 5


def test_gain_is_in_decibels():
    tone = (np.sin(np.arange(4000) * 0.5).astype(np.float32), 8000)
    plain = small(normalize="none").build(train=False)(tone).data
    torch.manual_seed(0)
    louder = small(normalize="none", augment={"gain": 6.0}).build(train=True)(tone).data
    peak = plain.argmax()
    torch.manual_seed(0)
    decibels = 6 * float(torch.empty(()).uniform_(-1, 1))
    assert abs((louder.flatten()[peak] - plain.max()) * 10 / math.log(10) - decibels) < 1e-2


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"RIFF but no sound", "cannot be read as sound"),
        (b"", "cannot be read as sound"),
        (np.zeros(10), "sound is bytes or"),
        ((np.zeros(0), 8000), "not empty"),
        ((np.zeros((100, 2)), 8000), "transpose it"),
        ((np.array([0.0, np.nan]), 8000), "NaN"),
        ((np.zeros(10), 0), "rate 0"),
    ],
)
def test_bad_sound_is_refused_with_the_reason(raw, says):
    with pytest.raises(ValueError, match=says):
        small().build(train=False)(raw)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_fft": 128}, "n_fft 128 is shorter than window 200"),
        ({"high": 5000.0}, "high <= rate / 2"),
        ({"low": 4000.0}, "low < high"),
        ({"mels": 128}, "lower mels"),
        ({"seconds": 1e-5}, "less than one sample"),
        ({"augment": "specaugmnt"}, "specaugment"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        small(**settings)


def test_blank_has_one_true_frame():
    blank = small().build(train=True).blank()
    assert blank.data.shape == (51, 24) and not blank.data.any()
    assert blank.mask is not None and blank.mask[0] and blank.mask.sum() == 1


def test_real_recordings():
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    recordings = sorted(DATA.glob("*_jackson_0.wav"))[:5]
    if not recordings:
        pytest.skip("shared/data/fsdd is not beside the repository")
    transform = small(seconds=1.0, rate=16000, window=400, hop=160, n_fft=512).build(train=False)
    items = [transform(path.read_bytes()) for path in recordings]
    assert {item.data.shape for item in items} == {(101, 24)}
    masks = [item.mask for item in items if item.mask is not None]
    assert len(masks) == len(items) and all(20 < int(mask.sum()) < 101 for mask in masks)
    # A recording of 8 kHz has nothing in the upper half of the bands of 16 kHz.
    assert all(item.data[item.mask][:, -4:].mean() < item.data[item.mask][:, :12].mean() - 1 for item in items)

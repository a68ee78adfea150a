import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mvpretrain.views.image import Augment, Blur, ImageConfig, ImageTransform, pixels

DATA = Path(__file__).parents[3] / "shared/data"


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def plain(size: int, **options) -> ImageTransform:
    return ImageConfig(size=size, normalize="none", **options).build(train=False)


def seeded(transform: ImageTransform, raw, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return transform(raw).data


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", ["none", "crop", "clip", "simclr"])
def test_the_shape_is_static_and_the_seed_decides(preset, channels):
    transform = ImageConfig(size=64, channels=channels, augment=preset).build(train=True)
    for height, width in [(64, 64), (30, 90), (200, 20), (1, 1)]:
        item = transform(picture(height, width))
        assert item.data.shape == (channels, 64, 64) and item.data.dtype == torch.float32 and item.mask is None
        assert item.data.isfinite().all()
    raw = picture(80, 100)
    assert torch.equal(seeded(transform, raw, 1), seeded(transform, raw, 1))
    assert torch.equal(seeded(transform, raw, 1), seeded(transform, raw, 2)) == (preset == "none")
    assert transform.blank().data.shape == (channels, 64, 64) and not transform.blank().data.any()


def test_evaluation_is_resize_and_centre_crop_without_chance():
    raw = picture(60, 120)
    transform = plain(20, augment="simclr")
    state = torch.get_rng_state()
    found = transform(raw).data
    assert torch.equal(torch.get_rng_state(), state)
    slow = Image.fromarray(raw).resize((40, 20), Image.Resampling.BICUBIC).crop((10, 0, 30, 20))
    assert np.abs(found.numpy().transpose(1, 2, 0) * 255 - np.asarray(slow)).max() <= 2


def test_normalisation_constants():
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    assert ImageConfig(size=8, normalize="half").build(False)(white).data.unique().tolist() == [1.0]
    data = ImageConfig(size=8, normalize="imagenet").build(False)(white).data
    assert torch.allclose(data[:, 0, 0], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    grey = ImageConfig(size=8, channels=1, normalize={"mean": (0.25,), "std": (0.5,)})  # pyright: ignore
    assert torch.allclose(grey.build(False)(white).data, torch.tensor(1.5))
    with pytest.raises(ValueError, match=r"needs 1 numbers \(channels: 1\)"):
        ImageConfig(channels=1, normalize={"mean": (0.5, 0.5, 0.5), "std": (1, 1, 1)})  # pyright: ignore
    with pytest.raises(ValueError, match="above 0"):
        ImageConfig(channels=1, normalize={"mean": (0.5,), "std": (0.0,)})  # pyright: ignore


def test_presets_and_what_overrides_them():
    assert Augment(preset="simclr").settings(32)["blur"] == 0 and Augment(preset="simclr").settings(32)["jitter"] == 0.5
    assert Augment(preset="simclr", jitter=0.1).settings(96) | {"ratio": None} == {
        "crop": (0.2, 1.0), "flip": 0.5, "jitter": 0.1, "grayscale": 0.2, "blur": 0.5, "ratio": None,
    }  # fmt: skip
    assert Augment(preset="clip").settings(224)["flip"] == 0
    flip = ImageConfig(size=8, normalize="none", augment=Augment(flip=1.0)).build(True)
    assert torch.equal(flip(picture(8, 8)).data, plain(8)(picture(8, 8)).data.flip(2))
    grey = ImageConfig(size=8, normalize="none", augment=Augment(grayscale=1.0)).build(True)(picture(8, 8)).data
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    with pytest.raises(ValueError, match="0 < min <= max <= 1"):
        Augment(crop=(0.5, 0.2))
    with pytest.raises(ValueError, match="simclr"):
        ImageConfig.model_validate({"augment": "simcrl"})
    with pytest.raises(ValueError, match="did you mean 'jitter'"):
        ImageConfig.model_validate({"augment": {"preset": "simclr", "jiter": 1}})


def test_jitter_is_within_its_strength():
    transform = ImageConfig(size=8, normalize="none", augment=Augment(jitter=0.5)).build(train=True)
    flat = np.full((8, 8, 3), 100, dtype=np.uint8)  # contrast, saturation and hue leave flat grey alone
    torch.manual_seed(0)
    found = torch.stack([transform(flat).data.mean() for _ in range(300)]) * 255
    assert 57 <= found.min() < 65 and 135 < found.max() <= 140  # each of three steps rounds down
    assert abs(((found - 100).abs() < 0.5).float().mean() - 0.2) < 0.08


def test_blur_is_torchvisions_away_from_the_border():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8))
    torch.manual_seed(5)
    sigma = float(torch.empty(()).uniform_(0.1, 2.0))
    torch.manual_seed(5)
    found = Blur(radius=4)(image)
    slow = v2.functional.gaussian_blur(image, [9, 9], [sigma, sigma])
    assert (found.int() - slow.int())[:, 4:-4, 4:-4].abs().max() <= 1 and (found != image).any()


def test_pil_reads_everything_where_torchvision_has_no_decoder(monkeypatch):
    raw = encoded(Image.fromarray(picture(12, 16)), "JPEG")
    fast = pixels(raw, 3)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(pixels(raw, 3), fast)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_give_the_array_back(form):
    raw = picture(12, 16)
    options = {"lossless": True} if form == "WEBP" else {}
    found = pixels(encoded(Image.fromarray(raw), form, **options), 3)
    assert np.array_equal(found.numpy().transpose(1, 2, 0), raw)
    assert torch.equal(pixels(Image.fromarray(raw), 3), found) and torch.equal(pixels(raw, 3), found)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_what_pil_says(mode):
    image = Image.fromarray(picture(12, 16)).convert(mode)
    raw = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    want = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)
    assert np.abs(pixels(raw, 3).numpy().transpose(1, 2, 0) - want).max() <= 1
    grey = np.asarray(Image.fromarray(want.astype(np.uint8)).convert("L")).astype(int)
    assert np.abs(pixels(raw, 1).numpy()[0] - grey).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.fromarray(picture(12, 16)).quantize(8)
    raw = encoded(image, "PNG", transparency=bytes([0, 128, 255]))
    assert np.array_equal(pixels(raw, 3).numpy().transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_damaged_files_are_errors_and_not_the_end_of_the_process():
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "WEBP"):
        raw = encoded(noise, form)
        for _ in range(100):
            damaged = bytearray(raw)
            for place in generator.integers(0, len(raw), 4):
                damaged[place] = generator.integers(256)
            with contextlib.suppress(ValueError):
                assert plain(8)(bytes(damaged)).data.isfinite().all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(form):
    grey = picture(12, 16)[:, :, 0]
    raw = encoded(Image.fromarray(grey.astype(np.uint16) * 257), form)
    assert np.array_equal(pixels(raw, 3)[2].numpy(), grey)
    assert np.array_equal(pixels(raw, 1)[0].numpy(), grey)


def test_exif_orientation_is_applied_and_animations_give_their_first_frame():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for form in ("JPEG", "PNG", "WEBP"):
        assert pixels(encoded(Image.fromarray(picture(12, 16)), form, exif=exif), 3).shape == (3, 16, 12)
    first, second = (Image.fromarray(np.full((6, 6), v, dtype=np.uint8)) for v in (255, 0))
    assert pixels(encoded(first, "GIF", save_all=True, append_images=[second]), 1).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "0 bytes starting"),
        (b"no image at all", "cannot be read as an image"),
        (encoded(Image.fromarray(picture(64, 64)), "JPEG")[:500], "cannot be read as an image"),
        (encoded(Image.fromarray(picture(64, 64)), "PNG")[:100], "cannot be read as an image"),
        (picture(8, 8).astype(np.float32), "float32 of shape"),
        (picture(8, 8).transpose(2, 0, 1), "put channels last"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "mode 'F'"),
        ("photo.jpg", "got str"),
    ],
)
def test_bad_images_are_refused_with_the_reason(raw, says):
    with pytest.raises(ValueError, match=says):
        plain(8)(raw)


def test_real_photographs():
    photographs = (
        sorted(DATA.glob("coco_mini_open/images/*.jpg"))[:4] + sorted(DATA.glob("eurosat_2k5/val/*/*.png"))[:4]
    )
    if not photographs:
        pytest.skip("shared/data with coco_mini_open and eurosat_2k5 is not beside the repository")
    transform = ImageConfig(size=48, augment="simclr").build(train=False)
    items = torch.stack([transform(path.read_bytes()).data for path in photographs])
    assert items.shape == (len(photographs), 3, 48, 48)
    assert (items.std(dim=(1, 2, 3)) > 0.05).all() and len(items.mean(dim=(1, 2, 3)).unique()) == len(items)

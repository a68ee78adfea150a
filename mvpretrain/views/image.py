"""Images: JPEG, PNG and WebP bytes, PIL images or uint8 arrays to `channels size size`."""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from einops import einsum, rearrange, repeat
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.transforms import v2

from mvpretrain.config import Config
from mvpretrain.types import View
from mvpretrain.views import ViewConfig, mixing

LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as in PIL


class Normalization(Config):
    """Subtract `mean`, divide by `std`, per channel, with pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATIONS = {
    "clip": Normalization(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
    "imagenet": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "half": Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "none": Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}

Preset = Literal["none", "crop", "clip", "simclr"]


class Augment(Config):
    """Random changes when training: a preset, and what differs from it.

    `crop` is the range of the cropped share of the area, `ratio` of its width to its height; `jitter` the strength s of
    SimCLR's colour jitter (brightness, contrast and saturation 0.8 s, hue 0.2 s, applied with probability 0.8); `flip`,
    `grayscale` and `blur` are probabilities. Without `crop` the image is cut as in evaluation.

    Presets: `crop` (area from 0.2, flip), `clip` (area from 0.9, as open_clip trains), `simclr` (Chen et al. 2020,
    appendix A; area from 0.2 as in MoCo, He et al. 2020, where SimCLR has 0.08). Under 64 pixels `simclr` has half the
    jitter and no blur (their appendix B.9).
    """

    preset: Preset = "none"
    crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float | None = Field(default=None, ge=0, le=1)
    jitter: float | None = Field(default=None, ge=0, le=1.25)
    grayscale: float | None = Field(default=None, ge=0, le=1)
    blur: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop is a range of the area, 0 < min <= max <= 1, got {self.crop}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is a range of width over height, 0 < min <= max, got {self.ratio}")
        return self

    def settings(self, size: int) -> dict[str, Any]:
        """The preset's values for this size, with one's own over them."""
        off = {"crop": None, "flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
        small = size < 64
        simclr = {"jitter": 0.5 if small else 1.0, "grayscale": 0.2, "blur": 0.0 if small else 0.5}
        presets: dict[str, dict[str, Any]] = {
            "none": {},
            "crop": {"crop": (0.2, 1.0), "flip": 0.5},
            "clip": {"crop": (0.9, 1.0)},
            "simclr": {"crop": (0.2, 1.0), "flip": 0.5, **simclr},
        }
        return off | presets[self.preset] | self.model_dump(exclude={"preset"}, exclude_none=True)


class ImageConfig(ViewConfig):
    """`size` is the side of the square that comes out; `augment` a preset or an `Augment` mapping.

    `normalize` names the constants of a family of models, or gives `{mean: [...], std: [...]}` with one number a
    channel; with one channel a family's constants are averaged.
    """

    kind: Literal["image"] = "image"
    field: str = "jpg;jpeg;png;webp"
    size: int = Field(default=224, gt=0)
    channels: Literal[1, 3] = 3
    augment: Preset | Augment = "none"
    normalize: Literal["clip", "imagenet", "half", "none"] | Normalization = "clip"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"size": 24}, {"size": 24, "augment": "simclr"}, {"size": 24, "channels": 1, "normalize": "half"}]

    @model_validator(mode="after")
    def _one_constant_a_channel(self) -> ImageConfig:
        mean, std = self.constants()
        if not len(mean) == len(std) == self.channels or min(std) <= 0:
            raise ValueError(
                f"normalize has mean {mean} and std {std}; each needs {self.channels} numbers (channels: "
                f"{self.channels}), those of std above 0"
            )
        return self

    def constants(self) -> tuple[list[float], list[float]]:
        """(mean, std), one number a channel."""
        if isinstance(self.normalize, Normalization):
            return list(self.normalize.mean), list(self.normalize.std)
        family = NORMALIZATIONS[self.normalize]
        mean, std = list(family.mean), list(family.std)
        return (mean, std) if self.channels == 3 else ([sum(mean) / 3], [sum(std) / 3])

    def build(self, train: bool) -> ImageTransform:
        return ImageTransform(self, train)

    def sketch(self, latent: np.ndarray) -> np.ndarray:
        """`size size channels` uint8: low cosines in both directions, their amplitudes a linear map of the latent."""
        amplitude = rearrange(mixing(3 * 16, latent)[: self.channels * 16], "(c f g) -> c f g", f=4, g=4)
        wave = np.cos(np.pi * np.outer(np.arange(self.size) + 0.5, np.arange(4)) / self.size)
        pattern = einsum(amplitude, wave, wave, "c f g, h f, w g -> h w c") / 2
        return (127.5 * (1 + np.tanh(pattern))).astype(np.uint8)


class ImageTransform:
    """An image to `channels size size`, float32, normalised; no mask.

    Evaluation: shortest side to `size` (bicubic, antialiased), then the centre. Augmentations run on uint8.
    """

    def __init__(self, config: ImageConfig, train: bool):
        self.channels, self.size = config.channels, config.size
        augment = config.augment if isinstance(config.augment, Augment) else Augment(preset=config.augment)
        mean, std = config.constants()
        self.steps = v2.Compose(
            [
                *random_steps(augment if train else Augment(), config.size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, raw: Any) -> View:
        return View(self.steps(pixels(raw, self.channels)))

    def blank(self) -> View:
        return View(torch.zeros(self.channels, self.size, self.size))


def random_steps(augment: Augment, size: int) -> list[nn.Module]:
    """uint8 `c h w` to uint8 `c size size`, in SimCLR's order: crop, flip, jitter, grey, blur."""
    s = augment.settings(size)
    bicubic: dict[str, Any] = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    if s["crop"] is None:
        steps: list[nn.Module] = [v2.Resize(size, **bicubic), v2.CenterCrop(size)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=s["crop"], ratio=s["ratio"], **bicubic)]
    if s["flip"]:
        steps.append(v2.RandomHorizontalFlip(s["flip"]))
    if s["jitter"]:
        strong = 0.8 * s["jitter"]
        steps.append(v2.RandomApply([v2.ColorJitter(strong, strong, strong, 0.2 * s["jitter"])], p=0.8))
    if s["grayscale"]:
        steps.append(v2.RandomGrayscale(s["grayscale"]))
    if s["blur"]:
        steps.append(v2.RandomApply([Blur(radius=max(1, size // 20))], p=s["blur"]))
    return steps


class Blur(nn.Module):
    """Gaussian blur with a deviation uniform in [0.1, 2] pixels, borders repeated.

    Two products with a banded matrix: at 224 pixels a quarter of the time of torchvision's two-dimensional convolution.
    """

    def __init__(self, radius: int):
        super().__init__()
        self.radius = radius

    def forward(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c h w"]:
        reach = torch.arange(-self.radius, self.radius + 1)
        weight = torch.softmax(-0.5 * (reach / torch.empty(()).uniform_(0.1, 2.0)) ** 2, dim=0)
        down, across = (self.band(side, reach, weight) for side in image.shape[1:])
        return (down @ image.float() @ across.T).round().to(torch.uint8)

    def band(self, side: int, reach: Tensor, weight: Tensor) -> Float[Tensor, "side side"]:
        source = (torch.arange(side)[:, None] + reach).clamp(0, side - 1)
        return torch.zeros(side, side).scatter_add_(1, source, weight.expand(side, -1))


def pixels(raw: Any, channels: int) -> UInt8[Tensor, "c h w"]:
    """Any form of an image as RGB or grey. Transparency is dropped, of an animation the first frame is taken.

    ValueError: neither bytes of a known format, nor a PIL image, nor a uint8 array `h w` or `h w c`.
    """
    if isinstance(raw, (bytes, bytearray, memoryview)):
        image = decode(bytes(raw))
    elif isinstance(raw, Image.Image):
        image = from_array(pil_array(raw))
    elif isinstance(raw, np.ndarray):
        image = from_array(raw)
    else:
        raise ValueError(f"an image is bytes, a PIL image or a uint8 array h w c, got {type(raw).__name__}")
    if channels == 3:
        return repeat(image, "1 h w -> 3 h w") if len(image) == 1 else image
    if len(image) == 1:
        return image
    return einsum(image.float(), LUMA, "c h w, c -> h w").round().to(torch.uint8)[None]


def decode(raw: bytes) -> UInt8[Tensor, "c h w"]:
    """RGB, EXIF orientation applied: JPEG by torchvision, in two thirds of PIL's time and to the same pixels.

    The rest is PIL's: torchvision's PNG reader ends the process on damaged data. Its JPEG reader is deprecated since
    0.29; once it is gone, PIL reads everything.
    """
    if not raw.startswith(b"\xff\xd8") or not hasattr(torchvision.io, "decode_jpeg"):
        return decode_with_pil(raw)
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
            image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:
        return decode_with_pil(raw)
    assert isinstance(image, Tensor)
    return image


def decode_with_pil(raw: bytes) -> UInt8[Tensor, "c h w"]:
    try:
        return from_array(pil_array(Image.open(io.BytesIO(raw))))
    except Exception as error:  # damaged files make PIL's readers raise many kinds
        raise ValueError(f"{len(raw)} bytes starting with {raw[:8]!r} cannot be read as an image: {error}") from error


def pil_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode!r} has no fixed range; convert it to 8 bits first")
    if image.mode.startswith("I;16"):  # PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    if "transparency" in image.info:  # PIL warns where a palette loses it in one step
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def from_array(array: np.ndarray) -> UInt8[Tensor, "c h w"]:
    """`h w`, `h w 1`, `h w 3` or `h w 4` (alpha dropped) of uint8."""
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"an image array is uint8 and h w, h w 1, h w 3 or h w 4, got {array.dtype} of shape {array.shape}; "
            "scale it to 0..255 and put channels last"
        )
    return rearrange(torch.from_numpy(array[:, :, :3].copy()), "h w c -> c h w")

"""Feature vectors: npy bytes, a JSON list or an array, flattened to `dim` numbers."""

from __future__ import annotations

import io
import json
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from mvpretrain.config import Config
from mvpretrain.types import View
from mvpretrain.views import ViewConfig, mixing


class Augment(Config):
    """Random changes when training: Gaussian `noise` of this deviation, then features set to 0 with `dropout`."""

    noise: float = Field(default=0.0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class VectorConfig(ViewConfig):
    """`dim` is the number of features; an array of any shape with that many entries is flattened.

    `log1p: true` takes sign(x) log(1 + |x|) first; then `mean` is subtracted and `std` divided by (one number, or one
    a feature). Noise and dropout are in units of the result.
    """

    kind: Literal["vector"] = "vector"
    field: str = "npy;json"
    dim: int = Field(gt=0)
    log1p: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    augment: Augment = Augment()

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"dim": 20}, {"dim": 20, "log1p": True, "augment": {"noise": 0.1, "dropout": 0.2}}]

    @model_validator(mode="after")
    def _one_constant_a_feature(self) -> VectorConfig:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != self.dim:
                raise ValueError(f"{name} has {len(value)} numbers for dim {self.dim}; give one, or one a feature")
        if np.min(self.std) <= 0:
            raise ValueError(f"std has {np.min(self.std)}, deviations are above 0; leave out constant features")
        return self

    def build(self, train: bool) -> VectorTransform:
        return VectorTransform(self, train)

    def sketch(self, latent: np.ndarray) -> np.ndarray:
        """A linear map of the latent, in the units that `mean`, `std` and `log1p` undo."""
        values = np.array(self.mean) + np.array(self.std) * mixing(self.dim, latent)
        return (np.sign(values) * np.expm1(np.abs(values)) if self.log1p else values).astype(np.float32)


class VectorTransform:
    """Numbers to `dim`, float32; no mask."""

    def __init__(self, config: VectorConfig, train: bool):
        self.config, self.train = config, train
        self.mean, self.std = torch.tensor(config.mean), torch.tensor(config.std)

    def __call__(self, raw: Any) -> View:
        x = numbers(raw, self.config.dim)
        x = x.sign() * x.abs().log1p() if self.config.log1p else x
        x = (x - self.mean) / self.std
        augment = self.config.augment
        if self.train and augment.noise:
            x = x + augment.noise * torch.randn_like(x)
        if self.train and augment.dropout:
            x = x * (torch.rand_like(x) >= augment.dropout)
        return View(x)

    def blank(self) -> View:
        return View(torch.zeros(self.config.dim))


def numbers(raw: Any, dim: int) -> Float[Tensor, " dim"]:
    """A flat float32 vector. ValueError: unreadable, not `dim` entries, or not all finite."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        raw = decode(bytes(raw))
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            array = np.asarray(raw, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a vector is an array or a list of {dim} numbers, got {type(raw).__name__}") from error
    if array.size != dim:
        raise ValueError(f"the vector has shape {array.shape}, {array.size} numbers, and dim is {dim}; set dim to fit")
    if not np.isfinite(array).all():
        raise ValueError(f"the vector of shape {array.shape} has NaN or infinite numbers; fill them when packing")
    return torch.from_numpy(array.reshape(dim).copy())


def decode(raw: bytes) -> Any:
    """npy by its first bytes, or else JSON."""
    try:
        if raw.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(raw), allow_pickle=False)
        return json.loads(raw)
    except Exception as error:  # a damaged header raises many kinds
        raise ValueError(f"{len(raw)} bytes starting with {raw[:8]!r} are neither npy nor JSON: {error}") from error

"""`kind: synthetic`: samples made up from a latent vector, to try a recipe without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal
from zlib import crc32

import numpy as np
from pydantic import Field, field_validator

from mvpretrain.config import unknown
from mvpretrain.data.sources import SourceConfig
from mvpretrain.types import Sample
from mvpretrain.views import ViewConfig

Sketch = Callable[[np.ndarray], Any]


class SyntheticConfig(SourceConfig):
    """Views of one latent vector: class centre + N(0, 1), and in each view + noise N(0, 1), drawn by its `sketch`.

    Centres are N(0, 1) in `latent` dimensions, classes equally likely. `missing` is the share of samples that lack a
    view, one for all or by field. The seed fixes all samples; eval samples are others than those of training.
    """

    kind: Literal["synthetic"] = "synthetic"
    samples: int = Field(default=10_000, ge=1)
    eval_samples: int = Field(default=1_000, ge=0)
    latent: int = Field(default=16, ge=1)
    classes: int = Field(default=10, ge=1)
    noise: float = Field(default=0.1, ge=0)
    missing: float | dict[str, float] = 0.0
    seed: int = Field(default=0, ge=0)

    @field_validator("missing")
    @classmethod
    def _shares(cls, missing: float | dict[str, float]) -> float | dict[str, float]:
        for share in missing.values() if isinstance(missing, dict) else [missing]:
            if not 0 <= share < 1:
                raise ValueError(f"missing is {share}; a share of samples is at least 0 and below 1")
        return missing

    def build(self, views: Mapping[str, ViewConfig], train: bool) -> list[Synthetic]:
        """The source whose samples have each view's first field; [] where eval_samples is 0.

        ValueError: `missing` names a field that no view reads.
        """
        sketches = {view.fields[0]: view.sketch for view in views.values()}
        for view in self.missing if isinstance(self.missing, dict) else ():
            if view not in sketches:
                raise ValueError(unknown("field in data.missing", view, sketches))
        count = self.samples if train else self.eval_samples
        return [Synthetic(self, sketches, 0 if train else self.samples, count)] if count else []


class Synthetic:
    """Samples number [first, first + count) of the endless data set that the settings describe."""

    def __init__(self, config: SyntheticConfig, sketches: Mapping[str, Sketch], first: int, count: int):
        self.name, self.weight, self.counts = "synthetic", 1.0, np.array([count])
        self.config, self.sketches, self.first = config, dict(sketches), first
        self.ids = np.arange(first, first + count)
        self.centres = np.random.default_rng([config.seed]).standard_normal((config.classes, config.latent))

    def latent(self, i: int) -> tuple[int, np.ndarray]:
        """(class, latent vector) of sample i."""
        draw = np.random.default_rng([self.config.seed, self.first + i, 1])
        label = int(draw.integers(self.config.classes))
        return label, self.centres[label] + draw.standard_normal(self.config.latent)

    def read(self, i: int) -> Sample:
        label, latent = self.latent(i)
        fields = {}
        for name, sketch in self.sketches.items():
            # A view's own generator: it does not depend on which other views there are.
            draw = np.random.default_rng([self.config.seed, self.first + i, crc32(name.encode()), 2])
            if draw.random() >= self.rate(name):
                fields[name] = sketch(latent + self.config.noise * draw.standard_normal(len(latent)))
        return Sample(int(self.ids[i]), f"{self.first + i:08d}", fields, label)

    def rate(self, view: str) -> float:
        missing = self.config.missing
        return missing.get(view, 0.0) if isinstance(missing, dict) else missing

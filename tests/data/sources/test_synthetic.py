from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mvpretrain.data.sources.synthetic import Synthetic, SyntheticConfig
from mvpretrain.views import ViewConfig


def exact(latent: np.ndarray) -> np.ndarray:
    return latent


def mirrored(latent: np.ndarray) -> np.ndarray:
    return -latent


SKETCHES = {"a": exact, "b": mirrored, "c": exact}


class Drawn(ViewConfig):
    """A view whose field is drawn by the function of that name in SKETCHES."""

    kind: str = "drawn"

    def sketch(self, latent: np.ndarray) -> np.ndarray:
        return SKETCHES[self.field](latent)


VIEWS = {f"view of {field}": Drawn(field=field) for field in SKETCHES}


def source(train: bool = True, **settings: Any) -> Synthetic:
    return SyntheticConfig.model_validate({"samples": 300, "eval_samples": 50} | settings).build(VIEWS, train)[0]


def test_views_show_one_latent_vector_and_its_class() -> None:
    found = source(noise=0.0)
    for i in (0, 7, 299):
        sample, (label, latent) = found.read(i), found.latent(i)
        assert sample.label == label and sample.id == found.ids[i]
        assert (sample.fields["a"] == latent).all() and (sample.fields["b"] == -latent).all()
    latents, labels = np.stack([found.latent(i)[1] for i in range(300)]), [found.latent(i)[0] for i in range(300)]
    distances = ((latents[:, None] - found.centres[None]) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == labels).mean() > 0.9 and set(labels) == set(range(10))


def test_noise_tells_views_apart_by_as_much_as_it_says() -> None:
    found = source(noise=0.5)
    rows = [(found.read(i).fields, found.latent(i)[1]) for i in range(300)]
    errors = {v: np.stack([f[v] * (-1 if v == "b" else 1) - latent for f, latent in rows]) for v in SKETCHES}
    for view in SKETCHES:
        assert abs(errors[view].std() - 0.5) < 0.02
    assert abs(np.corrcoef(errors["a"].ravel(), errors["c"].ravel())[0, 1]) < 0.06


def test_samples_are_fixed_by_seed_and_number() -> None:
    one, two, other = source(), source(), source(seed=1)
    for i in (5, 0, 5):
        assert (one.read(i).fields["a"] == two.read(i).fields["a"]).all()
        assert (one.read(i).fields["a"] != other.read(i).fields["a"]).all()
    fewer = SyntheticConfig().build({"c": VIEWS["view of c"]}, train=True)[0]
    assert (fewer.read(5).fields["c"] == one.read(5).fields["c"]).all()


def test_evaluation_has_other_samples_of_the_same_classes() -> None:
    train, evaluation = source(), source(train=False)
    assert not set(train.ids) & set(evaluation.ids) and evaluation.counts.tolist() == [50]
    assert (train.centres == evaluation.centres).all()
    latents = np.stack([train.latent(i)[1] for i in range(300)])
    assert min(np.abs(latents - evaluation.latent(i)[1]).max(axis=1).min() for i in range(50)) > 0.01
    assert SyntheticConfig(eval_samples=0).build(VIEWS, train=False) == []


def test_missing_views() -> None:
    found = source(missing={"a": 0.3, "c": 0.6})
    rows = [found.read(i).fields for i in range(300)]
    there = {v: np.array([v in f for f in rows]) for v in SKETCHES}
    assert there["b"].all() and abs(there["a"].mean() - 0.7) < 0.08 and abs(there["c"].mean() - 0.4) < 0.09
    assert abs(np.corrcoef(there["a"], there["c"])[0, 1]) < 0.2
    with pytest.raises(ValueError, match=r"data.missing 'd'; .*known: a, b, c"):
        source(missing={"d": 0.1})
    with pytest.raises(ValueError, match=r"missing is 1\.0"):
        SyntheticConfig(missing=1.0)

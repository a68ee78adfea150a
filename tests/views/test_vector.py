import io
import json

import numpy as np
import pytest
import torch

from mvpretrain.views.vector import Augment, VectorConfig


def npy(array: np.ndarray, **options) -> bytes:
    target = io.BytesIO()
    np.save(target, array, **options)
    return target.getvalue()


def test_every_form_gives_the_same_flat_vector():
    grid = np.arange(64, dtype=np.float64).reshape(8, 8)
    transform = VectorConfig(dim=64).build(train=False)
    for raw in (grid, npy(grid), json.dumps(grid.tolist()).encode(), grid.tolist(), torch.from_numpy(grid)):
        item = transform(raw)
        assert torch.equal(item.data, torch.arange(64.0)) and item.mask is None
    assert transform.blank().data.tolist() == [0.0] * 64


def test_log_then_mean_and_deviation():
    config = VectorConfig(dim=3, log1p=True, mean=(0.0, 1.0, 2.0), std=2.0)
    found = config.build(train=False)([0.0, np.e - 1, 1 - np.e**4]).data
    assert torch.allclose(found, torch.tensor([0.0, 0.0, -3.0]), atol=1e-6)


def test_the_raw_value_may_be_read_only():
    raw = np.ones(4, dtype=np.float32)
    raw.setflags(write=False)
    VectorConfig(dim=4).build(train=False)(raw).data.zero_()
    assert raw.sum() == 4


def test_augmentations_only_when_training_and_by_the_seed():
    config = VectorConfig(dim=10_000, augment=Augment(noise=0.5, dropout=0.2))
    raw = np.ones(10_000)
    assert torch.equal(config.build(train=False)(raw).data, torch.ones(10_000))
    transform = config.build(train=True)
    found = [(torch.manual_seed(seed), transform(raw).data)[1] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert abs((found[0] == 0).float().mean() - 0.2) < 0.02
    assert abs(found[0][found[0] != 0].std() - 0.5) < 0.02


def test_sketches_stand_in_the_units_that_the_settings_undo():
    latent = np.random.default_rng(0).standard_normal(16)
    plain = VectorConfig(dim=5)
    other = VectorConfig(dim=5, log1p=True, mean=3.0, std=0.5)
    assert torch.allclose(
        plain.build(False)(plain.sketch(latent)).data, other.build(False)(other.sketch(latent)).data, atol=1e-4
    )


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (np.zeros((2, 4)), r"shape \(2, 4\), 8 numbers, and dim is 3; set dim"),
        (b"[1, 2", "neither npy nor JSON"),
        (b'{"a": 1}', "got dict"),
        (b"[[1, 2], [3]]", "list of 3 numbers"),
        (npy(np.zeros(3))[:-4], "neither npy nor JSON"),
        (npy(np.array([{}, {}, {}], dtype=object), allow_pickle=True), "neither npy nor JSON"),
        ([1.0, float("nan"), 2.0], "NaN"),
        ([1.0, 1e300, 2.0], "infinite"),
        (None, r"shape \(\), 1 numbers"),
    ],
)
def test_bad_vectors_are_refused_with_the_reason(raw, says):
    with pytest.raises(ValueError, match=says):
        VectorConfig(dim=3).build(train=False)(raw)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="mean has 2 numbers for dim 3"):
        VectorConfig(dim=3, mean=(1.0, 2.0))
    with pytest.raises(ValueError, match="std has 0"):
        VectorConfig(dim=2, std=(1.0, 0.0))

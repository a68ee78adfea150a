"""What holds for every kind of view, found by walking the registry."""

import pickle

import numpy as np
import pytest
import torch

from mvpretrain.views import ViewConfig, piece, registry

SETTINGS = {
    "image": {"size": 24, "augment": "simclr"},
    "text": {"length": 64},
    "audio": {"rate": 8000, "seconds": 0.2, "window": 256, "mels": 32},
    "series": {"channels": 3, "length": 80},
    "vector": {"dim": 20},
}


@pytest.fixture(params=registry.kinds())
def config(request) -> ViewConfig:
    return registry.parse({"kind": request.param, **SETTINGS[request.param]})


def latents(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6))


def test_sketches_become_items_of_the_blank_shape(config):
    for train in (True, False):
        transform = config.build(train=train)
        blank = transform.blank()
        for latent in latents(3):
            item = transform(config.sketch(latent))
            assert item.data.shape == blank.data.shape and item.data.dtype == blank.data.dtype
            assert (item.mask is None) == (blank.mask is None) and item.data.isfinite().all()
        assert not blank.data.any()
        if blank.mask is not None:
            assert blank.mask.shape == blank.data.shape[:1] and blank.mask.nonzero().tolist() == [[0]]


def test_evaluation_leaves_chance_alone(config):
    transform, latent = config.build(train=False), latents(1)[0]
    state = torch.get_rng_state()
    first, second = transform(config.sketch(latent)), transform(config.sketch(latent.copy()))
    assert torch.equal(first.data, second.data) and torch.equal(torch.get_rng_state(), state)


def test_a_linear_map_finds_the_latent_in_the_sketch(config):
    """Two views of one latent can only be matched where each shows it: ridge regression on held-out rows."""
    z = latents(600)
    transform = config.build(train=False)
    data = torch.stack([transform(config.sketch(latent)).data for latent in z])
    if config.kind == "text":
        data = torch.nn.functional.one_hot(data)
    x = data.flatten(1).double().numpy()
    x = np.concatenate([x - x.mean(0), np.ones((len(x), 1))], axis=1)
    gram = x[:400] @ x[:400].T
    weight = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 400 * np.eye(400), z[:400])
    residual = z[400:] - x[400:] @ x[:400].T @ weight
    assert 1 - residual.var() / z[400:].var() > 0.7


def test_sketches_and_transforms_survive_a_spawned_worker(config):
    copy = pickle.loads(pickle.dumps(config))
    latent = latents(1)[0]
    assert repr(copy.sketch(latent)) == repr(config.sketch(latent))
    transform = pickle.loads(pickle.dumps(config.build(train=True)))
    assert torch.equal(transform.blank().data, config.build(train=True).blank().data)


def test_settings_round_trip_and_refuse_unknown_keys(config, tmp_path):
    assert registry.parse(config.model_dump(mode="json")) == config == config.portable(tmp_path)
    with pytest.raises(ValueError, match="unknown key 'missin'; did you mean 'missing'"):
        registry.parse({"kind": config.kind, "missin": "any", **SETTINGS[config.kind]})
    assert config.model_json_schema()["properties"]["field"]["default"] == config.field


def test_pieces():
    ramp = torch.arange(10)
    assert piece(ramp, 4, train=False).data.tolist() == [0, 1, 2, 3]
    short = piece(ramp, 12, train=True)
    assert short.mask is not None and short.data.tolist() == [*range(10), 0, 0] and short.mask.sum() == 10
    torch.manual_seed(0)
    assert {int(piece(ramp, 8, train=True).data[0]) for _ in range(50)} == {0, 1, 2}

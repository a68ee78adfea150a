"""Every kind of view is held to the laws of mvpretrain.testing, and each law catches a wrong one."""

from typing import Any

import numpy as np
import pytest
import torch

from mvpretrain.testing import check_view
from mvpretrain.testing._laws import settings_of
from mvpretrain.types import View
from mvpretrain.views import piece, registry

EXAMPLES = {f"{kind}-{i}": x for kind in registry.kinds() for i, x in enumerate(settings_of(registry, kind))}


@pytest.fixture(params=EXAMPLES)
def config(request):
    return EXAMPLES[request.param]


def test_the_laws_hold(config):
    check_view(config)


def test_a_blank_item_is_zero_with_one_position(config):
    blank = config.build(train=True).blank()
    assert not blank.data.any()
    if blank.mask is not None:
        assert blank.mask.nonzero().tolist() == [[0]]


@pytest.mark.parametrize("kind", registry.kinds())
def test_a_linear_map_finds_the_latent_in_the_sketch(kind):
    """Two views of one latent can only be matched where each shows it: ridge regression on held-out rows."""
    z, config = np.random.default_rng(0).standard_normal((600, 6)), EXAMPLES[f"{kind}-0"]
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


def test_unknown_keys_are_refused(config):
    with pytest.raises(ValueError, match="unknown key 'missin'; did you mean 'missing'"):
        registry.parse({**config.model_dump(mode="json"), "missin": "any"})
    schema = config.model_json_schema()["properties"]["field"]
    assert schema["default"] == type(config).model_fields["field"].default


class Halves:
    """The first half of six numbers, with noise in training; with a fault where one is named."""

    def __init__(self, train: bool, fault: str = ""):
        self.train, self.fault = train, fault
        self.hidden = (lambda: 0) if fault == "no pickle" else None

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{"field": "npy"}]

    @staticmethod
    def sketch(latent: np.ndarray) -> np.ndarray:
        return latent.astype(np.float32)

    def __call__(self, raw: Any) -> View:
        if self.fault != "trusting" and not (isinstance(raw, np.ndarray) and raw.shape == (6,)):
            raise ValueError(f"six numbers are needed, got {raw!r}")
        if self.fault == "in place":
            raw[0] = 0
        length = 2 if self.fault == "short" and not self.train else 3
        data = torch.from_numpy(raw[:length].copy())
        if self.train or self.fault == "noisy evaluation":
            data = data + torch.randn(length)
        return View(data + float(np.random.rand()) if self.fault == "numpy's chance" else data)

    def blank(self) -> View:
        return View(torch.full((3,), torch.nan if self.fault == "blank" else 0.0))


def test_a_sound_view_passes():
    check_view(Halves)


def test_a_class_that_draws_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot be drawn synthetically"):
        check_view({"kind": "builtins:list", "field": "npy"})


@pytest.mark.parametrize(("fault", "law", "words"), [
    ("blank", "shapes", r"blank\(\) with train=True is not finite"),
    ("short", "shapes", r"an item with train=False is \(2,\) torch.float32, and blank\(\) is \(3,\)"),
    ("noisy evaluation", "chance", "evaluation draws from torch's generator"),
    ("numpy's chance", "chance", "an item of the same field and seed, made again is"),
    ("in place", "fields", "the raw field is changed by the transform with train=True"),
    ("no pickle", "pickling", "(AttributeError|PicklingError)"),
    ("trusting", "bad fields", "b'' raises AttributeError, not ValueError"),
])  # fmt: skip
def test_a_fault_is_caught_by_its_law(fault, law, words):
    with pytest.raises(AssertionError, match=f"breaks the law of {law}: {words}"):
        check_view({"kind": f"{__name__}:Halves", "field": "npy", "fault": fault})


def test_pieces():
    ramp = torch.arange(10)
    assert piece(ramp, 4, train=False).data.tolist() == [0, 1, 2, 3]
    short = piece(ramp, 12, train=True)
    assert short.mask is not None and short.data.tolist() == [*range(10), 0, 0] and short.mask.sum() == 10
    torch.manual_seed(0)
    assert {int(piece(ramp, 8, train=True).data[0]) for _ in range(50)} == {0, 1, 2}

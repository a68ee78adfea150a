"""Every encoder of the registry is held to the laws of mvpretrain.testing, and each law catches a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpretrain.encoders import build, registry
from mvpretrain.testing import check_encoder
from mvpretrain.testing._laws import settings_of
from mvpretrain.testing.encoders import example
from mvpretrain.types import View

EXAMPLES = {f"{kind}-{i}": x for kind in registry.kinds() for i, x in enumerate(settings_of(registry, kind))}
IMAGES = [name for name in EXAMPLES if name.startswith(("conv", "resnet", "timm", "vit"))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_laws_hold(name: str) -> None:
    check_encoder(EXAMPLES[name])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "conv-1"])
def test_recomputed_activations_are_computed_in_the_backward_pass(name: str) -> None:
    encoder, view = build(EXAMPLES[name]), example(EXAMPLES[name])
    blocks: Any = encoder.blocks
    assert len(blocks) >= 2
    calls: list[int] = []
    for block in blocks:
        norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm))
        norm.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        encoder(view).square().mean().backward()
        assert len(calls) == (1 + step) * len(blocks)
        calls.clear()
        if step == 0:
            encoder.checkpoint_activations()  # type: ignore[operator]


@pytest.mark.parametrize("name", [*IMAGES, "huggingface-2", "openclip-0"])
def test_an_image_of_other_channels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, .*got \(1, 16, 16\).*channels|\(3, .*got \(1, 16, 16\).*(size|json)"):
        build(EXAMPLES[name])(View(torch.zeros(2, 1, 16, 16)))


class Linear(nn.Module):
    """The masked mean of a series, through one linear map; with a fault where one is named."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.dim, self.fault = 5, fault
        self.linear = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2) if fault == "unused part" else None
        Linear.built += fault == "another start"
        self.start = nn.Parameter(torch.full((5,), float(Linear.built)))

    built = 0

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}]

    def example_view(self, rows: int) -> View:
        return View(torch.randn(rows, 6, 4), torch.ones(rows, 6, dtype=torch.bool))

    def forward(self, view: View) -> Tensor:
        x = view.data.to(self.linear.weight.dtype)
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if view.mask is None else view.mask
        mask = torch.ones_like(mask) if self.fault == "no mask" else mask
        count = mask.sum(dim=1, keepdim=True)
        mean = (x * mask[..., None]).sum(dim=1) / (count if self.fault == "empty mean" else count.clamp_min(1))
        z = self.linear(mean) + self.start
        if self.fault == "batch statistics":
            z = z - z.mean(dim=0)
        if self.fault == "noise":
            z = z + torch.rand(())
        z = z.bfloat16() if self.fault == "half" else z.float()
        return z[:, :4] if self.fault == "narrow" else z


def test_a_sound_encoder_passes() -> None:
    check_encoder(Linear)


@pytest.mark.parametrize(("fault", "law", "words"), [
    ("narrow", "vectors", r"it gives \(3, 4\) in float32, and 3 rows of dim=5"),
    ("half", "vectors", "it gives torch.bfloat16 in float32"),
    ("unused part", "gradients", "no gradient reaches unused.weight, unused.bias"),
    ("another start", "parameters", "start is not what the seed says"),
    ("noise", "portability", "a row of the encoder built from its portable settings and weights is"),
    ("batch statistics", "independence", "row 0 without the other rows is"),
    ("no mask", "masks", "a row with other numbers in its padding is"),
    ("empty mean", "blanks", "its vector of an item whose mask is all False is not finite"),
])  # fmt: skip
def test_a_fault_is_caught_by_its_law(fault: str, law: str, words: str) -> None:
    with pytest.raises(AssertionError, match=f"Linear {{'fault': '{fault}'}} breaks the law of {law}: {words}"):
        check_encoder({"kind": f"{__name__}:Linear", "fault": fault})


def test_a_class_without_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'torch.nn:Identity' has no example_view\(rows\)"):
        check_encoder({"kind": "torch.nn:Identity"})

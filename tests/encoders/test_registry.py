"""Every encoder behind the registry, at its smallest, is held to the same contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpretrain.encoders import build, registry
from mvpretrain.types import Encoder, View

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2},
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **SMALL,
}
IMAGE, IDS, SERIES = (3, 16, 16), (6,), (20, 4)

# One row an encoder: name, settings, shape of an item.
CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("conv", {"kind": "conv", "width": 8, "stages": 2}, IMAGE),
    ("conv-batch", {"kind": "conv", "width": 8, "stages": 2, "norm": "batch"}, IMAGE),
    ("huggingface-mean", {"kind": "huggingface", "config": BERT}, IDS),
    ("huggingface-pooler", {"kind": "huggingface", "config": BERT, "pooling": "pooler"}, IDS),
    (
        "huggingface-image",
        {"kind": "huggingface", "config": {"model_type": "dinov2", "image_size": 16, "patch_size": 8, **SMALL}},
        IMAGE,
    ),
    ("mlp", {"kind": "mlp", "input": 80, "width": 16}, SERIES),
    ("openclip-image", {"kind": "openclip", "modality": "image", "config": CLIP}, IMAGE),
    ("openclip-text", {"kind": "openclip", "modality": "text", "config": CLIP}, IDS),
    ("resnet", {"kind": "resnet", "norm": "group"}, IMAGE),
    ("series", {"kind": "series", "channels": 4, "strides": (2, 3), "width": 16, "depth": 2, "heads": 2}, SERIES),
    (
        "timm",
        {"kind": "timm", "model": "vit_tiny_patch16_224", "image_size": 16, "options": {"depth": 2, "embed_dim": 24}},
        IMAGE,
    ),
    ("transformer", {"kind": "transformer", "length": 8, "width": 16, "depth": 2, "heads": 2}, IDS),
    ("vit", {"kind": "vit", "image_size": 16, "width": 16, "depth": 2, "heads": 2}, IMAGE),
    ("vit-mean", {"kind": "vit", "image_size": 16, "width": 16, "depth": 2, "heads": 2, "pool": "mean"}, IMAGE),
]
MASKED = [case for case in CASES if case[0].startswith(("huggingface-mean", "mlp", "series", "transformer"))]


def each(cases: list[Any]) -> Any:
    return pytest.mark.parametrize(("settings", "item"), [case[1:] for case in cases], ids=[case[0] for case in cases])


def made(settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build(settings)


def data(item: tuple[int, ...], rows: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 30, (rows, *item)) if item == IDS else torch.randn(rows, *item)


def test_every_kind_is_among_the_cases() -> None:
    assert {case[1]["kind"] for case in CASES} == set(registry.kinds())


@each(CASES)
def test_one_float32_vector_a_row_in_any_precision(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    module, view = made(settings), View(data(item))
    encoder: Encoder = module
    assert isinstance(encoder, Encoder)
    assert module.training
    plain = encoder(view)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder(view)
    half = copy.deepcopy(module).bfloat16()(view)
    for z in (plain, cast, half):
        assert z.shape == (3, encoder.dim)
        assert z.dtype == torch.float32
        assert z.isfinite().all()
    assert plain.std(dim=0).max() > 1e-4, "rows must differ"


@each(CASES)
def test_gradient_reaches_every_trainable_parameter(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    encoder = made(settings)
    z = encoder(View(data(item)))
    (z * torch.randn(z.shape)).sum().backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in trainable.values())


@each(CASES)
def test_parameters_are_as_deepspeed_takes_them_and_as_the_seed_says(
    settings: dict[str, Any], item: tuple[int, ...]
) -> None:
    encoder, again = made(settings), made(settings)
    for p, q in zip(encoder.parameters(), again.parameters()):
        assert p.ndim > 0
        assert p.is_contiguous()
        assert p.dtype == torch.float32
        assert torch.equal(p, q)


@each(CASES)
def test_portable_settings_and_a_state_dict_are_the_whole_encoder(
    settings: dict[str, Any], item: tuple[int, ...]
) -> None:
    encoder, view = made(settings).eval(), View(data(item))
    written = registry.parse(settings).portable(encoder).model_dump_json()
    other = build(registry.config(settings["kind"]).model_validate_json(written)).eval()
    assert not torch.equal(other(view), encoder(view))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(view), encoder(view))


@each([case for case in CASES if case[0] != "conv-batch"])
def test_recomputed_activations_give_the_same_gradients(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    encoder, view = made(settings), View(data(item))
    assert len(encoder.blocks) >= 2
    names = list(encoder.state_dict())
    calls: list[int] = []
    for block in encoder.blocks:
        norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm))
        norm.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for step in range(2):
        encoder.zero_grad()
        encoder(view).square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.requires_grad])
        assert len(calls) == (1 + step) * len(encoder.blocks), "the second pass through the blocks must be in backward"
        calls.clear()
        if step == 0:
            encoder.checkpoint_activations()
    assert list(encoder.state_dict()) == names
    for once, twice in zip(*gradients):
        torch.testing.assert_close(once, twice)


@each(MASKED)
def test_padding_does_not_change_the_result(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    encoder, x = made(settings).eval(), data(item)
    lengths = torch.tensor([1, item[0] // 2, item[0]])
    mask = torch.arange(item[0]) < lengths[:, None]
    expected = encoder(View(x, mask))
    other = x.clone()
    other[~mask] = 17 if item == IDS else 1e3
    torch.testing.assert_close(encoder(View(other, mask)), expected)
    if settings["kind"] != "mlp":  # an item on its own, without any padding
        for row, length in enumerate(lengths.tolist()):
            alone = encoder(View(x[row : row + 1, :length], None))
            torch.testing.assert_close(alone[0], expected[row], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoder(View(x, torch.ones_like(mask)))[0], expected[0])


@each(MASKED)
def test_rows_without_data_are_finite(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    encoder = made(settings)
    mask = torch.zeros(3, item[0], dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True
    z = encoder(View(data(item), mask))
    z.sum().backward()
    assert z.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@each([case for case in CASES if case[2] == IMAGE])
def test_an_image_of_other_channels_is_refused(settings: dict[str, Any], item: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(3, .*got \(1, 16, 16\).*channels|\(3, .*got \(1, 16, 16\).*(size|json)"):
        made(settings)(View(torch.zeros(2, 1, 16, 16)))

"""The encoders written here, against slow references and bad settings."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mvpretrain.encoders import build
from mvpretrain.encoders._layers import Block, masked_mean, plain_parameters, repeated_blocks
from mvpretrain.types import View


def test_block_is_attention_written_out_row_by_row() -> None:
    torch.manual_seed(0)
    block = Block(8, heads=2)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    q, k, v = block.qkv(block.attention_norm(x)).split(8, dim=2)
    seen = torch.zeros(2, 5, 8)
    for b in range(2):
        for i in range(5):
            for part in (slice(0, 4), slice(4, 8)):
                there = [j for j in range(5) if mask[b, j]]
                weights = torch.stack([q[b, i, part] @ k[b, j, part] / 2 for j in there]).softmax(0)
                seen[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, there))
    y = x + block.out(seen)
    wanted = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(block(x, mask), wanted)
    torch.testing.assert_close(block(x, mask, first=2), wanted[:, :2])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_vit_computes_of_its_last_block_the_class_token_alone(checkpointed: bool) -> None:
    """Numbers and gradients are those of whole blocks."""
    torch.manual_seed(0)
    encoder: Any = build({"kind": "vit", "image_size": 8, "patch": 2, "width": 12, "depth": 3, "heads": 2}).double()
    shapes: list[tuple[int, ...]] = []
    encoder.blocks[-1].mlp.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    data, weight = torch.randn(3, 3, 8, 8).double(), torch.randn(3, 12)
    whole = copy.deepcopy(encoder)
    if checkpointed:
        encoder.checkpoint_activations()
    found = (encoder(View(data)) * weight).sum()
    assert shapes == [(3, 1, 12)]
    for block in whole.blocks:
        block.forward = partial(lambda forward, x, first=None: forward(x), block.forward)
    wanted = (whole(View(data)) * weight).sum()
    assert shapes == [(3, 1, 12), (3, 17, 12)]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # in float32, as encoders return it
    one, other = (torch.autograd.grad(loss, list(e.parameters())) for loss, e in ((found, encoder), (wanted, whole)))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_masked_mean_is_the_mean_of_what_is_there() -> None:
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(masked_mean(x, mask), torch.stack([x[0, [0, 2]].mean(0), x[1].mean(0)]))
    torch.testing.assert_close(masked_mean(x, None), x.mean(1))


def test_vit_reads_patches_as_a_strided_convolution_does() -> None:
    torch.manual_seed(0)
    encoder: Any = build(
        {"kind": "vit", "image_size": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2, "pool": "mean"}
    )
    image = torch.randn(2, 3, 8, 8)
    kernel = encoder.embed.weight.reshape(8, 3, 4, 4)
    x = torch.nn.functional.conv2d(image, kernel, encoder.embed.bias, stride=4).flatten(2).transpose(1, 2)
    x = encoder.blocks[0](x + encoder.positions)
    torch.testing.assert_close(encoder(View(image)), encoder.norm(x).mean(1))


def test_parameters_that_deepspeed_refuses_are_mended() -> None:
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.conv, before = conv, conv.weight.clone()
    plain_parameters(module)
    assert module.scale.shape == (1,)
    assert not module.scale.requires_grad
    assert conv.weight.is_contiguous()
    assert torch.equal(conv.weight, before)


def test_repeated_parts_are_found_by_name_the_outermost_first() -> None:
    model = torch.nn.Module()
    model.stem = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    model.blocks = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    assert repeated_blocks(model) == list(model.blocks)
    assert repeated_blocks(torch.nn.Linear(1, 1)) is None


def test_conv_on_the_smallest_images_and_resnet_at_its_dim() -> None:
    encoder: Any = build({"kind": "conv", "channels": 1, "width": 16, "stages": 3, "depth": 2})
    assert encoder.dim == 64
    assert len(encoder.blocks) == 6
    assert encoder(View(torch.randn(2, 1, 8, 8))).shape == (2, 64)
    assert encoder.blocks[-1](torch.randn(2, 64, 2, 2)).shape == (2, 64, 2, 2)
    assert build({"kind": "resnet", "depth": 50}).dim == 2048


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vit", "image_size": 30, "patch": 4}, "image_size 30 is no multiple of patch 4"),
        ({"kind": "transformer", "width": 100, "heads": 3}, "width 100 cannot be split among 3 heads"),
        ({"kind": "series", "channels": 2, "kernel": 4}, "kernel 4 must be odd"),
        ({"kind": "series", "channels": 2, "strides": (7,)}, "no less than the largest stride 7"),
        ({"kind": "series", "channels": 2, "strides": ()}, r"\(1,\) keeps every time step"),
        ({"kind": "conv", "width": 12}, "multiple of 8"),
        ({"kind": "mlp"}, "input"),
        ({"kind": "resnet", "depth": 20}, "18, 34 or 50"),
        ({"kind": "convolution"}, "did you mean 'conv'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        build(settings)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"kind": "mlp", "input": 12}, (3, 5), r"\(12\), got \(15,\); set its input"),
        ({"kind": "series", "channels": 2}, (9, 3), r"\(any, 2\), got \(9, 3\); set its channels"),
        ({"kind": "conv", "stages": 4}, (3, 16, 4), "at least 8, got 4; give it fewer stages"),
        ({"kind": "vit"}, (3, 28, 28), r"\(3, 32, 32\), got \(3, 28, 28\); resize"),
        ({"kind": "transformer", "length": 8}, (9,), "up to 8 tokens, got 9; raise its length"),
    ],
)
def test_items_of_another_shape_are_refused(settings: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    data = torch.zeros(2, *shape)
    with pytest.raises(ValueError, match=message):
        build(settings)(View(data.long() if settings["kind"] == "transformer" else data))

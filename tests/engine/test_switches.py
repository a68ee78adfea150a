"""What makes a step faster must not change it: groups of like length, compiled towers, channels-last weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain import encoders
from mvpretrain.model.tower import TowerConfig, by_length
from mvpretrain.types import View
from tests.engine.small import batch_of, engine_of, rows_of, task_of

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 10, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2},
}
TEXT: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "transformer", "vocabulary": 32, "length": 10, "width": 16, "depth": 2, "heads": 2},
    "openclip": {"kind": "openclip", "modality": "text", "config": CLIP},
}


def texts(rows: int = 7) -> View:
    """Ids of 1 to 9 tokens, unsorted, the largest id at the end as open_clip wants it; one row has no token at all."""
    make = torch.Generator().manual_seed(3)
    data, mask = torch.zeros(rows, 10, dtype=torch.int64), torch.zeros(rows, 10, dtype=torch.bool)
    for i, n in enumerate([4, 9, 1, 6, 2, 9, 0][:rows]):
        data[i, :n] = torch.randint(1, 30, (n,), generator=make)
        data[i, max(n - 1, 0)] = 31
        mask[i, :n] = True
    return View(data, mask)


@pytest.mark.parametrize("groups", [1, 2, 3, 20])
@pytest.mark.parametrize("kind", TEXT)
def test_groups_of_like_length_are_the_whole(kind, groups):
    torch.manual_seed(0)
    encoder = encoders.build(TEXT[kind]).double()
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].data.shape[1]))
    view = texts(6)  # a text of nothing is the mean over padding: it depends on how much there is
    found = by_length(encoder, view, groups)
    assert len(calls) == groups and min(calls) < 10
    wanted = encoder(view)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(6, found.shape[1], dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True) for x in (found, wanted)]
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_rows_without_any_token_stay_finite():
    torch.manual_seed(0)
    assert by_length(encoders.build(TEXT["transformer"]), texts(), 3).isfinite().all()


def test_text_that_looks_ahead_is_not_cut():
    config = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "no_causal_mask": True}}
    encoder = encoders.build({"kind": "openclip", "modality": "text", "config": config})
    with pytest.raises(ValueError, match="openclip text encoder takes items of shape"):
        by_length(encoder, texts(), 2)


def test_views_without_lengths_are_refused():
    config = TowerConfig(encoder={"kind": "mlp", "input": 6}, length_groups=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"length_groups=3 is for views whose first axis .*is 6 a sample"):
        by_length(config.encoder.build(), View(torch.zeros(4, 6)), config.length_groups)


def weights_of(rank: int, kind: str, settings: dict[str, Any], steps: int) -> dict[str, Tensor]:
    batch = batch_of(3)
    engine = engine_of(kind, lambda collectives: task_of(3, torch.float32, collectives), **settings)
    for _ in range(steps):
        assert engine.step(rows_of(batch, rank, engine.world.size)).stepped
    return engine.weights()


@pytest.mark.filterwarnings("ignore")  # torch warns of its own deprecated imports
def test_compiled_towers_step_as_others_do(monkeypatch):
    """Traced, and run without the code generator: C++ takes a minute to compile."""
    plain, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or plain(self, backend="aot_eager")
    )
    found, wanted = weights_of(0, "none", {"compile": True}, 2), weights_of(0, "none", {}, 2)
    assert len(compiled) == 2 and found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_channels_last_weights_step_as_others_do():
    torch.manual_seed(0)
    engine = engine_of("none", channels_last=True)
    assert engine.step(batch_of(3)).stepped


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("zero2", {"channels_last": True}, "engine.channels_last with engine.kind=zero2: DeepSpeed cannot hold such"),
    ("zero3", {"compile": True}, "engine.compile with engine.kind=zero3: weights are not there when it traces"),
])  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused(ranks, kind, settings, message):
    for text in ranks(2).run(refusal, kind, settings):
        assert message in text


def refusal(rank: int, kind: str, settings: dict[str, Any]) -> str:
    try:
        engine_of(kind, **settings)
    except ValueError as error:
        return str(error)
    return ""

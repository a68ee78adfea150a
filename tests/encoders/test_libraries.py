"""Encoders from libraries give what the library gives, from local files only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mvpretrain.encoders import build, registry
from mvpretrain.encoders.huggingface import HuggingFaceConfig
from mvpretrain.encoders.openclip import OpenCLIPConfig
from mvpretrain.types import View

BERT: dict[str, Any] = HuggingFaceConfig.examples()[0]["config"]
CLIP: dict[str, Any] = OpenCLIPConfig.examples()[0]["config"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP"])
def test_openclip_towers_are_those_of_the_whole_model(layout: str, image: torch.Tensor, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    whole, path = getattr(open_clip, layout)(**CLIP), str(tmp_path / "whole.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, path)
    tokens = torch.randint(0, 32, (2, 6))
    settings = {"kind": "openclip", "config": CLIP, "pretrained": path}
    tower: Any = build({**settings, "modality": "image"})
    torch.testing.assert_close(tower(View(image)), whole.encode_image(image))
    assert len(tower.blocks) == 2
    text: Any = build({**settings, "modality": "text"})
    torch.testing.assert_close(text(View(tokens, tokens > 3)), whole.encode_text(tokens))
    assert sum(p.numel() for p in text.parameters()) + sum(p.numel() for p in tower.parameters()) == sum(
        p.numel() for name, p in whole.named_parameters() if name != "logit_scale"
    )
    larger = build({**settings, "modality": "image", "force_image_size": 32})
    assert larger(View(torch.randn(2, 3, 32, 32))).isfinite().all()


@pytest.mark.parametrize("more", [{}, {"ls_init_value": 0.3, "final_ln_after_pool": True}])
def test_openclip_computes_of_its_last_block_the_class_token_alone(image: torch.Tensor, more: dict[str, Any]) -> None:
    """Numbers and gradients are those of whole blocks."""
    torch.manual_seed(0)
    config = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], **more}}
    encoder: Any = build({"kind": "openclip", "modality": "image", "config": config}).double()
    shapes: list[tuple[int, ...]] = []
    encoder.blocks[-1].mlp.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape[:2])))
    whole = copy.deepcopy(encoder)
    for block in whole.blocks:
        block.__dict__.pop("forward", None)
    found, wanted = encoder.tower(image.double()), whole.tower(image.double())
    assert shapes == [(2, 1), (2, 5)]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weight = torch.randn(found.shape).double()
    one, other = (
        torch.autograd.grad((z * weight).sum(), list(e.parameters())) for z, e in ((found, encoder), (wanted, whole))
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("more", [{"pool_type": "avg"}, {"qk_norm": True}, {"attentional_pool": True}])
def test_openclip_computes_all_of_its_last_block_where_it_is_read(image: torch.Tensor, more: dict[str, Any]) -> None:
    config = {**CLIP, "embed_dim": 16, "vision_cfg": {**CLIP["vision_cfg"], **more}}
    encoder: Any = build({"kind": "openclip", "modality": "image", "config": config})
    shapes: list[tuple[int, ...]] = []
    encoder.blocks[-1].mlp.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape[:2])))
    encoder(View(image))
    assert shapes == [(2, 5)]


def test_openclip_takes_coca_timm_and_block_variants(image: torch.Tensor) -> None:
    vision = {**CLIP["vision_cfg"], "scale_heads": True, "attentional_pool": True, "attn_pooler_queries": 4}
    coca = {**CLIP, "vision_cfg": {**vision, "output_tokens": True}, "multimodal_cfg": {"width": 8}}
    encoder: Any = build(
        {"kind": "openclip", "modality": "image", "config": {**coca, "embed_dim": 16}, "force_image_size": 16}
    )
    encoder.checkpoint_activations()
    encoder(View(image)).sum().backward()
    trunk = {"timm_model_name": "resnet18", "timm_model_pretrained": True, "image_size": 32}
    encoder = build({"kind": "openclip", "modality": "image", "config": {**CLIP, "vision_cfg": trunk}})
    assert encoder(View(torch.randn(2, 3, 32, 32))).shape == (2, 12)
    assert len(encoder.blocks) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "ViT-B-33"}, "unknown open_clip model 'ViT-B-33'; nearest: ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "'laion2b_s34b_b79k' is a hub tag; nothing is down"),
        ({"model": "roberta-ViT-B-32", "modality": "text"}, "'roberta-base', and nothing is downloaded; use kind hugg"),
        ({"config": CLIP, "pretrained": "nowhere.pt"}, "'nowhere.pt' is no file or folder"),
        ({"config": CLIP, "pretrained": "."}, "'.' is a folder; give the weights file"),
        ({"config": {**CLIP, "embed_dims": 3}}, "openclip config: .*embed_dims"),
        ({"config": {"embed_dim": 3}}, "no 'vision_cfg'"),
        ({"config": CLIP, "model": "ViT-B-32"}, "either a model name or a config"),
        ({}, "either a model name or a config"),
        ({"config": CLIP, "modality": "text", "force_image_size": 32}, "force_image_size is 32 for a text tower"),
    ],
)
def test_openclip_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        build({"kind": "openclip", "modality": "image", **change})


def test_openclip_refuses_text_of_another_length_and_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(6\), got \(7,\); give the view tokenizer openclip:config"):
        build({"kind": "openclip", "modality": "text", "config": CLIP})(View(torch.zeros(2, 7, dtype=torch.int64)))
    torch.save({"visual.proj": torch.zeros(2, 2)}, path := tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt' does not fit the config: .*proj"):
        build({"kind": "openclip", "modality": "image", "config": CLIP, "pretrained": str(path)})


VIT = {"kind": "timm", "model": "vit_tiny_patch16_224", "image_size": 16, "options": {"depth": 1, "embed_dim": 24}}


def test_timm_gives_the_features_before_the_classifier(image: torch.Tensor, tmp_path: Path) -> None:
    import timm

    whole: Any = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1, embed_dim=24).eval()
    torch.save(whole.state_dict(), path := tmp_path / "vit.pt")
    encoder = build({**VIT, "pretrained": str(path)}).eval()
    torch.testing.assert_close(encoder(View(image)), whole.forward_head(whole.forward_features(image), pre_logits=True))
    with pytest.raises(ValueError, match=r"vit.pt' does not fit 'resnet18': missing \['conv1.weight'"):
        build({"kind": "timm", "model": "resnet18", "pretrained": str(path)})
    with pytest.raises(ValueError, match=r"vit.pt' does not fit 'vit_tiny_patch16_224': .*pos_embed"):
        build({**VIT, "image_size": 32, "pretrained": str(path)})


def test_timm_models_of_any_size_and_of_scalar_parameters() -> None:
    settings = {"kind": "timm", "model": "resnet18", "channels": 1, "image_size": 32}
    encoder: Any = build(settings)
    assert encoder(View(torch.randn(2, 1, 32, 48))).shape == (2, encoder.dim) == (2, 512)
    wide: Any = build({"kind": "timm", "model": "mobilenetv3_small_050"})
    assert wide.eval()(View(torch.randn(2, 3, 32, 32))).shape == (2, wide.dim)
    with torch.device("meta"):
        gained = build({"kind": "timm", "model": "dm_nfnet_f0"})  # skipinit_gain is a scalar there
    assert all(p.ndim > 0 for p in gained.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet19"}, "unknown timm model 'resnet19'; nearest: resnet"),
        ({"model": "hf_hub:timm/resnet18"}, "unknown timm model 'hf_hub:timm/resnet18'"),
        ({"options": {"drop_paths": 0.1}}, "'vit_tiny_patch16_224' cannot be built with .*drop_paths"),
        ({"pretrained": "nowhere.pt"}, "'nowhere.pt' is no file or folder"),
    ],
)
def test_timm_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({**VIT, **change})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT as `save_pretrained` writes it, in half precision."""
    import transformers

    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("bert")
    transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**BERT)).half().save_pretrained(found)
    return str(found)


def test_huggingface_pools_the_hidden_states_of_the_folder(folder: str) -> None:
    import transformers

    ids, mask = torch.randint(1, 40, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    out = model(input_ids=ids, attention_mask=mask.long())
    hidden: Any = out.last_hidden_state
    expected = {
        "cls": hidden[:, 0],
        "mean": torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]),
        "pooler": out.pooler_output,
    }
    for pooling, z in expected.items():
        encoder = build({"kind": "huggingface", "folder": folder, "pooling": pooling}).eval()
        torch.testing.assert_close(encoder(View(ids, mask)), z)
    fresh = build({"kind": "huggingface", "folder": folder, "weights": False}).eval()
    assert not torch.allclose(fresh(View(ids, mask)), expected["mean"])


def test_huggingface_portable_settings_name_no_folder(folder: str) -> None:
    settings = {"kind": "huggingface", "folder": folder, "pooling": "cls"}
    encoder: Any = build(settings).eval()
    portable = registry.parse(settings).portable(encoder)
    assert folder not in portable.model_dump_json()
    other: Any = build(portable).eval()
    other.load_state_dict(encoder.state_dict())
    ids = torch.randint(1, 40, (2, 5))
    assert torch.equal(other(View(ids)), encoder(View(ids)))
    assert len(encoder.blocks) == 2
    assert encoder.training is False
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == ["model.pooler.dense.weight", "model.pooler.dense.bias"]


def test_huggingface_takes_waveforms_spectrograms_and_encoders_of_pairs() -> None:
    wave = {"model_type": "wav2vec2", "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    wave |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", **SMALL}
    encoder: Any = build({"kind": "huggingface", "config": wave}).eval()
    mask = torch.arange(800) < torch.tensor([[800], [400]])
    x = torch.randn(2, 800, 1).masked_fill(~mask[..., None], 0)
    z = encoder(View(x, mask))
    assert z.shape == (2, 16)
    assert encoder.model.config.layerdrop == 0
    assert not encoder.model.masked_spec_embed.requires_grad
    bins = {
        "model_type": "audio-spectrogram-transformer",
        "max_length": 32,
        "num_mel_bins": 16,
        "patch_size": 8,
        **SMALL,
    }
    assert build({"kind": "huggingface", "config": bins})(View(torch.randn(2, 32, 16), mask[:, :32])).shape == (2, 16)
    pair = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    text = View(torch.ones(2, 4, dtype=torch.int64))
    encoder = build({"kind": "huggingface", "config": pair}).eval()
    other = build(registry.parse({"kind": "huggingface", "config": pair}).portable(encoder)).eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(text), encoder(text))
    assert "model.embed_tokens.weight" in encoder.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "nowhere"}, "'nowhere' is no file or folder"),
        ({"folder": str(Path(__file__).parent)}, "gives no model: "),
        ({"config": {"vocab_size": 3}}, "no 'model_type'"),
        ({"config": {"model_type": "bart_simpson"}}, "gives no model: .*bart_simpson"),
        ({}, "either a model folder or a config"),
        (
            {"pooling": "pooler", "config": {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2}},
            "DistilBertModel has no pooler; set pooling",
        ),
    ],
)
def test_huggingface_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        build({"kind": "huggingface", **change})


def test_huggingface_refuses_longer_texts() -> None:
    encoder = build({"kind": "huggingface", "config": {**BERT, "max_position_embeddings": 8}})
    with pytest.raises(ValueError, match="up to 8 tokens, got 9; shorten"):
        encoder(View(torch.ones(2, 9, dtype=torch.int64)))

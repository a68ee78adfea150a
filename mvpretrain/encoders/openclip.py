"""One tower of an open_clip model, with its projection."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items, local_file, unknown_model
from mvpretrain.types import View

# open_clip builds both towers; the one that is not asked for is built as small as can be, and dropped.
SMALLEST = {
    "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


class OpenCLIPConfig(EncoderConfig):
    """The tower of `model`, a name that `open_clip.list_models()` knows, or of an architecture written out in `config`
    as open_clip's own files have it (embed_dim, vision_cfg, text_cfg).

    `pretrained` is a file with the weights of a whole open_clip model, of which this tower's are read.
    """

    kind: Literal["openclip"] = "openclip"
    modality: Literal["image", "text"]
    model: str | None = None
    config: dict[str, Any] | None = None
    pretrained: str | None = None
    force_image_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_architecture(self) -> OpenCLIPConfig:
        if (self.model is None) == (self.config is None):
            raise ValueError("openclip encoder needs either a model name or a config, and not both")
        if self.modality == "text" and self.force_image_size is not None:
            raise ValueError(f"force_image_size is {self.force_image_size} for a text tower; leave it out")
        return self

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {
                "modality": modality,
                "config": {
                    "embed_dim": 12,
                    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2},
                    "text_cfg": {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2},
                },
            }
            for modality in ("image", "text")
        ]

    def example_view(self, rows: int) -> View:
        import open_clip

        settings = self.config or open_clip.get_model_config(self.model)
        assert settings is not None, self.model
        if self.modality == "text":
            text = settings["text_cfg"]
            return View(torch.randint(1, text["vocab_size"] - 1, (rows, text["context_length"])))
        side = self.force_image_size or settings["vision_cfg"]["image_size"]
        return View(torch.randn(rows, 3, side, side))

    def build(self) -> OpenCLIP:
        return OpenCLIP(self)

    def portable(self, encoder: nn.Module) -> OpenCLIPConfig:
        return self.model_copy(update={"pretrained": None})


class OpenCLIP(nn.Module):
    """`encode_image` or `encode_text` of an open_clip model, not normalised: `b 3 h w` or `b n` ids to `b embed_dim`.

    Text must be of the tower's context length, in the model's own ids (view tokenizer `openclip:NAME`). Its mask hides
    nothing, as these models were trained without, but where no token sees later ones the padding after the longest
    text is not computed, and shorter rows are taken. `tower` has the parameters that open_clip.CustomTextCLIP has under
    `visual` or `text`. ValueError: unknown model, a file that does not fit, other channels, size or length.
    """

    def __init__(self, config: OpenCLIPConfig):
        import open_clip

        super().__init__()
        self.modality, self.name = config.modality, config.model or "config"
        architecture = _architecture(config)
        self.dim = architecture["embed_dim"]
        try:
            whole: Any = open_clip.CustomTextCLIP(**architecture)
        except TypeError as error:  # open_clip reads its settings as keyword arguments
            raise ValueError(f"openclip {self.name}: {error}; compare the config with open_clip's own") from error
        self.tower: Any = whole.visual if config.modality == "image" else whole.text
        # CoCa's towers return their tokens as well, for its decoder.
        self.tower.output_tokens = False
        if config.pretrained is not None:
            _load(whole, self.tower, config)
        if config.force_image_size and hasattr(self.tower, "set_input_size"):
            self.tower.set_input_size(config.force_image_size)
        _layers.plain_parameters(self)
        if self._reads_class_token():
            # Nobody reads what the last block gives for the patches. Replaced in the instance, as for checkpointing.
            last = self.tower.transformer.resblocks[-1]
            last.forward = partial(class_token, last)

    @property
    def blocks(self) -> list[nn.Module] | None:
        return _layers.repeated_blocks(self.tower)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        if self.modality == "text":
            if view.data.ndim == 2 and view.data.shape[1] <= self.tower.context_length and self._looks_back():
                return self._cut(_layers.without_padding(view).data)
            remedy = f"give the view tokenizer openclip:{self.name} and this length"
            check_items(view.data, (self.tower.context_length,), "openclip text", remedy)
            return self.tower(view.data).float()
        size = self.tower.image_size
        shape = (3, *size) if isinstance(size, tuple) else (3, size, size)
        check_items(view.data, shape, "openclip image", "resize the view, or set the encoder's force_image_size")
        return self.tower(view.data.to(next(self.parameters()).dtype)).float()

    def _reads_class_token(self) -> bool:
        """Whether it is a vision transformer of plain blocks that ends in the vector of its class token."""
        from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

        tower = self.tower
        plain = isinstance(tower, VisionTransformer) and type(tower.transformer.resblocks[-1]) is ResidualAttentionBlock
        return plain and tower.attn_pool is None and tower.pool_type == "tok"

    def _looks_back(self) -> bool:
        """Whether what follows a text's last token changes nothing: attention is causal, and that token is the text."""
        tower = self.tower
        plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
        causal = getattr(tower, "attn_mask", None) is not None
        return plain and causal and getattr(tower, "pool_type", None) in ("argmax", "eos")

    def _cut(self, ids: Tensor) -> Float[Tensor, "b d"]:
        """A text of fewer ids: open_clip cuts its positions to them, and its causal mask must follow."""
        whole, n = self.tower.attn_mask, ids.shape[1]
        self.tower.attn_mask = whole[:n, :n]
        try:
            return self.tower(ids).float()
        finally:
            self.tower.attn_mask = whole

    def checkpoint_activations(self) -> None:
        if hasattr(self.tower, "trunk"):
            self.tower.set_grad_checkpointing()
        else:  # open_clip's own switch does nothing for its ResNets, and fails on blocks with scale_heads and the like
            _layers.checkpoint_activations(self.blocks)


def class_token(block: Any, x: Float[Tensor, "b n d"], **_: None) -> Float[Tensor, "b 1 d"]:
    """The output of one of open_clip's plain blocks for the first token, which attends to all: `b n d` to `b 1 d`."""
    normed = block.ln_1(x)
    token = x[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed))
    return token + block.ls_2(block.mlp(block.ln_2(token)))


def _architecture(config: OpenCLIPConfig) -> dict[str, Any]:
    """The keyword arguments of open_clip.CustomTextCLIP with one tower as asked for and the other tiny."""
    import open_clip

    if config.model is not None and config.model not in open_clip.list_models():
        raise ValueError(unknown_model("open_clip", config.model, open_clip.list_models()))
    found = deepcopy(config.config) if config.model is None else open_clip.get_model_config(config.model)
    assert isinstance(found, dict)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in found:
            raise ValueError(f"openclip config has no {key!r}, got {sorted(found)}; see open_clip's model configs")
    settings = {key: value for key, value in found.items() if key not in ("custom_text", "multimodal_cfg")}
    if config.modality == "text":
        if "hf_model_name" in found["text_cfg"]:
            raise ValueError(
                f"the text tower of {config.model or 'config'} is the hub's {found['text_cfg']['hf_model_name']!r}, "
                "and nothing is downloaded; use kind huggingface with its folder"
            )
        return {**settings, "vision_cfg": SMALLEST["vision_cfg"]}
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"]["timm_model_pretrained"] = False
    if config.force_image_size:
        settings["vision_cfg"]["image_size"] = config.force_image_size
    return {**settings, "text_cfg": SMALLEST["text_cfg"]}


def _load(whole: Any, tower: Any, config: OpenCLIPConfig) -> None:
    """Read this tower's part of a checkpoint of a whole model, in either of open_clip's two layouts."""
    from open_clip import get_pretrained_cfg
    from open_clip.factory import load_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    path = config.pretrained
    assert path is not None
    if config.model is not None and get_pretrained_cfg(config.model, path):
        raise ValueError(f"pretrained {path!r} is a hub tag; nothing is downloaded: fetch its file and give the path")
    found = local_file(path, "openclip encoder, pretrained")
    if found.is_dir():
        raise ValueError(f"openclip encoder, pretrained: {path!r} is a folder; give the weights file in it")
    try:
        state: Any = load_state_dict(str(found), weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"pretrained {path!r} holds more than weights: {' '.join(str(error).split())[:300]}"
        ) from error
    if "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    prefix = "visual." if config.modality == "image" else "text."
    if config.modality == "image":
        resize_pos_embed(state, whole)
    try:
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"pretrained {path!r} does not fit {config.model or 'the config'}: {reason}") from error

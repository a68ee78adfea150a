"""Models of the transformers library, from a local folder."""

from __future__ import annotations

import inspect
import json
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mvpretrain.encoders import EncoderConfig, _layers, check_items, local_file
from mvpretrain.types import View


class HuggingFaceConfig(EncoderConfig):
    """A model folder as `save_pretrained` writes it, or an architecture written out in `config` (with a `model_type`).

    `input` is the argument of the model's forward that gets the view: `input_ids`, `pixel_values`, `input_values`
    (default: the model's main one). `pooling`: the first token, the mean over what is not padding, or the model's own
    pooler. `weights: false` takes only the folder's architecture.
    """

    kind: Literal["huggingface"] = "huggingface"
    folder: str | None = None
    config: dict[str, Any] | None = None
    input: str | None = None
    pooling: Literal["cls", "mean", "pooler"] = "mean"
    weights: bool = True

    @model_validator(mode="after")
    def _one_architecture(self) -> HuggingFaceConfig:
        if (self.folder is None) == (self.config is None):
            raise ValueError("huggingface encoder needs either a model folder or a config, and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError(
                f"huggingface config has no 'model_type', got {sorted(self.config)}; copy it from the folder"
            )
        return self

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return [
            {"config": {"model_type": "bert", "vocab_size": 40, **still, **small}},
            {"config": {"model_type": "bert", "vocab_size": 40, **still, **small}, "pooling": "pooler"},
            {"config": {"model_type": "dinov2", "image_size": 16, "patch_size": 8, **small}},
        ]

    def example_view(self, rows: int) -> View:
        settings = self.build().settings
        if side := getattr(settings, "image_size", None):
            return View(torch.randn(rows, settings.num_channels, side, side))
        return View(torch.randint(1, settings.vocab_size, (rows, 6)), torch.ones(rows, 6, dtype=torch.bool))

    def build(self) -> HuggingFace:
        return HuggingFace(self)

    def portable(self, encoder: nn.Module) -> HuggingFaceConfig:
        assert isinstance(encoder, HuggingFace)
        settings = json.loads(encoder.settings.to_json_string(use_diff=False))
        settings.pop("_name_or_path", None)
        return self.model_copy(update={"folder": None, "config": settings})


class HuggingFace(nn.Module):
    """The pooled last hidden state of a transformers model: `b n` ids, `b c h w` or `b frames mels` to `b dim`.

    Of models with a decoder the encoder is taken. A waveform view `b n 1` is given to `input_values` as `b n`. Padding
    does not change the result where the model takes an attention mask and normalises no statistics over time. A
    parameter that the pooled output does not depend on (an unused pooler, a mask token) is frozen, so that no engine
    waits for its gradient. The library's module is `model`. ValueError: no model there, or a pooler that it lacks.
    """

    def __init__(self, config: HuggingFaceConfig):
        super().__init__()
        whole = _model(config)
        self.settings = whole.config
        self.model: Any = whole.get_encoder() if self.settings.is_encoder_decoder else whole
        self.pooling, self.input = config.pooling, config.input or self.model.main_input_name
        self.takes_mask = "attention_mask" in inspect.signature(self.model.forward).parameters
        self.dim = int(getattr(self.settings, "hidden_size", None) or self.settings.hidden_sizes[-1])
        _layers.plain_parameters(self)
        self._freeze_unused()

    @property
    def blocks(self) -> list[nn.Module] | None:
        return _layers.repeated_blocks(self.model)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        data, mask = view.data, _layers.never_empty(view.mask) if self.takes_mask else None
        if self.input == "input_values" and data.ndim == 3 and data.shape[2] == 1:
            data = rearrange(data, "b n 1 -> b n")
        if data.is_floating_point():
            data = data.to(next(self.parameters()).dtype)
        self._check(data)
        arguments = {self.input: data} if mask is None else {self.input: data, "attention_mask": mask.long()}
        out = self.model(**arguments)
        if self.pooling == "pooler":
            if getattr(out, "pooler_output", None) is None:
                raise ValueError(f"{type(self.model).__name__} has no pooler; set pooling to cls or mean")
            return out.pooler_output.flatten(1).float()
        hidden = out.last_hidden_state
        if hidden.ndim == 4:
            hidden = rearrange(hidden, "b c h w -> b (h w) c")
        return hidden[:, 0].float() if self.pooling == "cls" else _layers.masked_mean(hidden, _fitted(mask, hidden))

    def checkpoint_activations(self) -> None:
        # The library's own switch has changed its name between versions.
        _layers.checkpoint_activations(self.blocks)

    def _check(self, data: Tensor) -> None:
        if (item := _item(self.settings, self.input)) is not None:
            check_items(data, item, "huggingface", f"{self.input} must be what the model's config.json says")
        longest = getattr(self.settings, "max_position_embeddings", None)
        if self.input == "input_ids" and isinstance(longest, int) and data.shape[1] > longest:
            raise ValueError(f"huggingface encoder takes up to {longest} tokens, got {data.shape[1]}; shorten the view")

    def _freeze_unused(self) -> None:
        item = _item(self.settings, self.input)
        if item is None:
            return
        anything = {"input_ids": 4, "pixel_values": 64, "input_values": 16_000}[self.input]
        example = torch.zeros(1, *[length or anything for length in item])
        self.eval()  # what training drops or masks at random must not decide here
        used = _reached(self(View(example.long() if self.input == "input_ids" else example)))
        self.train()
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in used)


def _model(config: HuggingFaceConfig) -> Any:
    """The library's model in float32, of a folder or of written-out settings."""
    import transformers

    folder = None if config.folder is None else local_file(config.folder, "huggingface encoder, folder")
    try:
        if folder is None:
            settings = transformers.AutoConfig.for_model(**(config.config or {}))
        else:
            settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _refuse_kernels(settings)
        # Layers that are left out at random leave their parameters without gradient on some ranks: DDP would hang.
        for key in ("layerdrop", "encoder_layerdrop"):
            if getattr(settings, key, 0):
                setattr(settings, key, 0.0)
        if folder is None or not config.weights:
            model = transformers.AutoModel.from_config(settings, dtype=torch.float32)
        else:
            options = {"config": settings, "local_files_only": True, "dtype": torch.float32}
            model = transformers.AutoModel.from_pretrained(
                folder, **options, trust_remote_code=False, weights_only=True
            )
    except (OSError, ValueError, UnpicklingError) as error:
        where = config.folder or "config"
        raise ValueError(
            f"huggingface encoder: {where!r} gives no model: {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def _refuse_kernels(settings: Any) -> None:
    """ValueError where settings name attention code of a hub, which the library would fetch and run."""
    for part in (settings, *(getattr(settings, name, None) for name in getattr(settings, "sub_configs", ()))):
        name = getattr(part, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise ValueError(f"its attention is {name!r}, code of a hub; nothing is fetched, take sdpa or eager")


def _item(settings: Any, name: str) -> tuple[int | None, ...] | None:
    """The shape of one item, None for any length; None altogether where the library's settings do not say it."""
    if name == "pixel_values":
        size = getattr(settings, "image_size", None)
        sides = size if isinstance(size, list | tuple) else (size, size)
        return getattr(settings, "num_channels", 3), *sides
    if name == "input_values" and hasattr(settings, "num_mel_bins"):
        return settings.max_length, settings.num_mel_bins
    return (None,) if name in ("input_ids", "input_values") else None


def _reached(output: Tensor) -> set[int]:
    """The ids of the leaves of the autograd graph behind a tensor."""
    todo: list[Any] = [output.grad_fn]
    seen, leaves = set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
            todo += [before for before, _ in node.next_functions]
    return leaves


def _fitted(mask: Bool[Tensor, "b n"] | None, hidden: Float[Tensor, "b m d"]) -> Bool[Tensor, "b m"] | None:
    """The mask at the length of the hidden states, which are fewer than the inputs where the model has strides."""
    if mask is None or mask.shape[1] == hidden.shape[1]:
        return mask
    nearest = interpolate(rearrange(mask.float(), "b n -> b 1 n"), size=hidden.shape[1])
    return _layers.never_empty(rearrange(nearest > 0.5, "b 1 m -> b m"))

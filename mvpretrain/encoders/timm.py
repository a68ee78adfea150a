"""Image models of the timm library."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from mvpretrain.encoders import EncoderConfig, _layers, check_items, local_file, unknown_model
from mvpretrain.types import View

# Arguments of timm.create_model that name files and addresses of weights.
LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class TimmConfig(EncoderConfig):
    """`model` is a name that `timm.list_models()` knows; `options` go to `timm.create_model` (drop_path_rate, ...).

    `pretrained` is a weights file; the classifier in it is left out. `image_size` is for models of fixed input size
    (vision transformers); convolutional networks take any.
    """

    kind: Literal["timm"] = "timm"
    model: str
    pretrained: str | None = None
    image_size: PositiveInt | None = None
    channels: PositiveInt = 3
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _no_files(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in LOADING & value.keys():
            raise ValueError(f"options.{key} would let timm read or fetch weights by itself; give a file as pretrained")
        return value

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {"model": "vit_tiny_patch16_224", "image_size": 16, "options": {"depth": 2, "embed_dim": 24}},
        ]

    def example_view(self, rows: int) -> View:
        side = self.image_size or 64
        return View(torch.randn(rows, self.channels, side, side))

    def build(self) -> Timm:
        return Timm(self)

    def portable(self, encoder: nn.Module) -> TimmConfig:
        return self.model_copy(update={"pretrained": None})


class Timm(nn.Module):
    """A timm model without its classifier: `b c h w` to the pooled features `b dim`; the library's module is `model`.

    ValueError: unknown model or option, a file that does not fit, other channels, or another size where it is fixed.
    """

    def __init__(self, config: TimmConfig):
        import timm

        super().__init__()
        if not timm.is_model(config.model):
            raise ValueError(unknown_model("timm", config.model, timm.list_models()))
        expected = timm.get_pretrained_cfg(config.model, allow_unregistered=False)
        fixed = bool(expected and expected.fixed_input_size)
        options = dict(config.options, num_classes=0, in_chans=config.channels)
        if config.image_size is not None and fixed:
            options["img_size"] = config.image_size
        try:
            self.model: Any = timm.create_model(config.model, pretrained=False, **options)
        except (TypeError, AssertionError) as error:  # timm reads its options as keyword arguments
            raise ValueError(f"timm model {config.model!r} cannot be built with {options}: {error}") from error
        size = config.image_size or (expected.input_size[-1] if expected else None)
        side = size if fixed and not config.options.get("dynamic_img_size") else None
        self.item = (config.channels, side, side)
        # Some models widen their features once more before the classifier.
        self.dim = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)
        if config.pretrained is not None:
            _load(self.model, config)
        _layers.plain_parameters(self)

    @property
    def blocks(self) -> list[nn.Module] | None:
        return _layers.repeated_blocks(self.model)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        check_items(view.data, self.item, "timm", "resize the view, or set the encoder's image_size and channels")
        return self.model(view.data.to(next(self.parameters()).dtype)).float()

    def checkpoint_activations(self) -> None:
        try:
            self.model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            name = type(self.model).__name__
            raise ValueError(f"timm's {name} cannot recompute activations; switch that off for this encoder") from error


def _load(model: nn.Module, config: TimmConfig) -> None:
    """Read a checkpoint whose only surplus may be the classifier."""
    import timm

    path = config.pretrained
    assert path is not None
    found = local_file(path, "timm encoder, pretrained")
    if found.is_dir():
        raise ValueError(f"timm encoder, pretrained: {path!r} is a folder; give the weights file in it")
    try:
        keys = timm.models.load_checkpoint(model, str(found), strict=False, weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"pretrained {path!r} does not fit {config.model!r}: {reason}") from error
    if keys is None:  # a NumPy archive, whose loader checks for itself
        return
    heads = _classifiers(config.model)
    surplus = [k for k in keys.unexpected_keys if not k.startswith(heads)]
    if keys.missing_keys or surplus:
        raise ValueError(
            f"pretrained {path!r} does not fit {config.model!r}: missing {keys.missing_keys[:3]}, "
            f"not known to the model {surplus[:3]}; give the file of this very model"
        )


def _classifiers(model: str) -> tuple[str, ...]:
    """The names under which a timm model keeps its classifier."""
    import timm

    expected = timm.get_pretrained_cfg(model, allow_unregistered=False)
    names = (expected.classifier if expected else None) or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))

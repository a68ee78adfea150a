"""The laws of encoders: what holds for every kind and modality."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mvpretrain import encoders
from mvpretrain.encoders import EncoderConfig
from mvpretrain.testing._laws import described, law, require, require_close, require_finite, settings_of
from mvpretrain.types import Encoder, RecomputesActivations, View

ROWS = 3
FILLER = 1e3  # what padding holds, where items are floats


def check_encoder(encoder: str | type | Mapping[str, Any] | EncoderConfig) -> None:
    """Hold an encoder to the laws of encoders.

    `encoder`: settings with a `kind`, or a kind, import path or class, whose examples() are then all checked, on what
    example_view(rows) gives. AssertionError: a sentence with the law, the settings and the numbers. ValueError: nothing
    to check. Cost: a few dozen passes over three small items.
    """
    for config in settings_of(encoders.registry, encoder):
        view = example(config)
        for name, check in LAWS:
            with law(name, described(config)):
                check(config, view)


def example(config: EncoderConfig) -> View:
    """The same three items every time."""
    torch.manual_seed(1)
    return config.example_view(ROWS)


def build(config: EncoderConfig) -> Any:
    """The encoder from one seed."""
    torch.manual_seed(0)
    return config.build()


def trainable(encoder: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


def check_vectors(config: EncoderConfig, view: View) -> None:
    """One float32 vector of `dim` numbers a row in any precision, and rows that differ."""
    encoder = build(config)
    require(isinstance(encoder, Encoder), "it has no `dim` or is not callable")
    require(encoder.training, "it is not in training mode once it is built")
    plain = encoder(view)
    require(float(plain.detach().std(dim=0).max()) > 1e-4, "every row is the same")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder(view)
    found = {"float32": plain, "autocast": cast, "bfloat16": copy.deepcopy(encoder).bfloat16()(view)}
    found["float64"] = copy.deepcopy(encoder).double()(as_double(view))
    for precision, z in found.items():
        shape, wanted = tuple(z.shape), (ROWS, encoder.dim)
        require(shape == wanted, f"it gives {shape} in {precision}, and {ROWS} rows of dim={encoder.dim} are {wanted}")
        ok = z.dtype == torch.float32 or (precision == "float64" and z.dtype == torch.float64)
        require(ok, f"it gives {z.dtype} in {precision}, and what follows is computed in float32")
        require_finite(z, f"its vector in {precision}")


def as_double(view: View) -> View:
    return view._replace(data=view.data.double()) if view.data.is_floating_point() else view


def check_gradients(config: EncoderConfig, view: View) -> None:
    """A finite gradient reaches every trainable parameter."""
    encoder = build(config)
    z = encoder(view)
    (z * torch.randn(z.shape)).sum().backward()
    require(bool(trainable(encoder)), "it has no parameter to train")
    missed = [name for name, p in trainable(encoder).items() if p.grad is None]
    require(not missed, f"no gradient reaches {', '.join(missed)}")
    for name, p in trainable(encoder).items():
        require_finite(p.grad, f"the gradient of {name}")


def check_parameters(config: EncoderConfig, view: View) -> None:
    """Parameters as DeepSpeed 0.19.8 takes them, and as the seed says."""
    again = dict(build(config).named_parameters())
    for name, p in build(config).named_parameters():
        sound = p.ndim > 0 and p.is_contiguous() and p.dtype == torch.float32
        require(sound, f"{name} is {tuple(p.shape)} {p.dtype}; one dimension or more, contiguous, float32 is needed")
        require(torch.equal(p, again[name]), f"{name} is not what the seed says: it differs when built again")


def check_portability(config: EncoderConfig, view: View) -> None:
    """Settings survive pickle; portable ones as JSON and a state dict are the whole encoder."""
    require(pickle.loads(pickle.dumps(config)) == config, "its settings are others after pickle")
    encoder, portable = build(config).eval(), config.portable(build(config))
    written = type(portable).model_validate_json(portable.model_dump_json())
    torch.manual_seed(2)
    other: Any = written.build().eval()
    other.load_state_dict(encoder.state_dict())
    require_close(other(view), encoder(view), 0, 0, "a row of the encoder built from its portable settings and weights")


def check_independence(config: EncoderConfig, view: View) -> None:
    """In evaluation a row is the same each time, and does not depend on the other rows."""
    encoder = build(config).eval()
    whole = encoder(view)
    require_close(encoder(view), whole, 0, 0, "a row of the same view, encoded again,")
    for i in range(ROWS):
        one = encoder(view.rows(slice(i, i + 1)))
        require_close(one[0], whole[i], 1e-4, 1e-5, f"row {i} without the other rows")


def check_mask(config: EncoderConfig, view: View) -> None:
    """What padding holds does not matter; an item without it is the same, or of a refused length; data counts."""
    if view.mask is None:
        return
    encoder, length = build(config).eval(), view.mask.shape[1]
    lengths = torch.tensor([1, length // 2, length])
    mask = torch.arange(length) < lengths[:, None]
    wanted, other = encoder(View(view.data, mask)), view.data.clone()
    other[~mask] = FILLER if other.is_floating_point() else other.max()
    require_close(encoder(View(other, mask)), wanted, 1e-5, 1e-5, "a row with other numbers in its padding")
    for row, count in enumerate(lengths.tolist()):
        try:
            alone = encoder(View(view.data[row : row + 1, :count], None))[0]
        except ValueError:
            continue  # an encoder of one length says so
        require_close(alone, wanted[row], 1e-4, 1e-5, f"row {row} on its own, without padding,")
    same = torch.allclose(encoder(View(view.data, torch.ones_like(mask)))[0], wanted[0])
    require(not same, f"a row is the same with one position of data and with {length}")


def check_blanks(config: EncoderConfig, view: View) -> None:
    """Rows of blank items, which stand for missing views, are finite and leave finite gradients."""
    encoder, blank = build(config), View(torch.zeros_like(view.data))
    if view.mask is not None:
        mask = torch.zeros_like(view.mask)
        mask[:, 0] = True
        blank = View(blank.data, mask)
    for what, items in (("blank items", blank), ("one blank item", mixed(view, blank))):
        encoder.zero_grad()
        z = encoder(items)
        z.sum().backward()
        require_finite(z, f"its vector of {what}")
        for name, p in trainable(encoder).items():
            require_finite(p.grad, f"the gradient of {name} for {what}")
    if blank.mask is not None:
        z = encoder(View(view.data, torch.zeros_like(blank.mask)))
        require_finite(z, "its vector of an item whose mask is all False")


def mixed(view: View, blank: View) -> View:
    """The view with a blank first row."""
    return View.cat([blank.rows(slice(0, 1)), view.rows(slice(1, None))])


def check_checkpointing(config: EncoderConfig, view: View) -> None:
    """Where activations can be recomputed in the backward pass, gradients and parameter names stay."""
    encoder = build(config)
    if not (isinstance(encoder, nn.Module) and isinstance(encoder, RecomputesActivations)):
        return
    gradients: list[list[Tensor]] = []
    names = list(encoder.state_dict())
    for _ in range(2):
        encoder.zero_grad()
        encoder(view).square().mean().backward()
        gradients.append([p.grad.clone() for p in trainable(encoder).values() if p.grad is not None])
        try:
            encoder.checkpoint_activations()
        except ValueError:
            return  # this very model cannot, and says so
    require(list(encoder.state_dict()) == names, "its state dict has other names with recomputed activations")
    for name, once, twice in zip(trainable(encoder), *gradients, strict=True):
        require_close(twice, once, 1e-4, 1e-6, f"the gradient of {name} with recomputed activations")


LAWS: tuple[tuple[str, Callable[[EncoderConfig, View], None]], ...] = (
    ("vectors", check_vectors),
    ("gradients", check_gradients),
    ("parameters", check_parameters),
    ("portability", check_portability),
    ("independence", check_independence),
    ("masks", check_mask),
    ("blanks", check_blanks),
    ("checkpointing", check_checkpointing),
)

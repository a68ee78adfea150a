"""An exported view as a module: from its folder alone, without the training libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from mvpretrain import views
from mvpretrain.config import check_name, unknown
from mvpretrain.files import check_format
from mvpretrain.model.tower import Tower, TowerConfig
from mvpretrain.registry import trusting
from mvpretrain.types import Encoder, Transform, View
from mvpretrain.views import ViewConfig

FOLDER = "{folder}"  # stands in config.json for the folder that holds it


class Exported(nn.Module):
    """One view's encoder and head with its evaluation preprocessing.

    `forward` and `features` are differentiable and follow `train()` and `eval()`; `embed` always evaluates. `dim` is
    the width of an embedding, all heads side by side; `width` that of the features.
    """

    def __init__(self, name: str, view: ViewConfig, tower: TowerConfig, dim: int, heads: int = 1):
        super().__init__()
        self.name, self.view, self.dim = name, view, dim
        self.tower = Tower(tower, dim // heads, heads)
        self.width = cast(Encoder, self.tower.encoder).dim
        self.transform: Transform = view.build(train=False)

    def forward(self, view: View) -> Float[Tensor, "b d"]:
        """Unit rows in the space that the views share."""
        return self.tower.embed(view)

    def features(self, view: View) -> Float[Tensor, "b e"]:
        """The encoder's output before the head, `width` numbers a row: for probes and fine-tuning."""
        return self.tower.encoder(view)

    @torch.no_grad()
    def embed(self, values: Sequence[Any], batch: int = 256) -> Float[Tensor, "n d"]:
        """Raw values to unit rows on the CPU, in their order, `batch` at a time.

        A value is what the view's field holds: a file's bytes, or a `pathlib.Path` to one; a string for text; a PIL
        image; an array. ValueError: one value instead of a list, or a value that the view cannot read.
        """
        if isinstance(values, str | bytes | Path):
            raise ValueError(f"embed takes a list of values, got one {type(values).__name__}; write embed([value])")
        before, device = self.training, next(self.parameters(), torch.empty(0)).device
        self.eval()
        try:
            rows = [
                self(View.stack([self.read(value) for value in values[at : at + batch]]).to(device)).cpu()
                for at in range(0, len(values), batch)
            ]
        finally:
            self.train(before)
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    def read(self, value: Any) -> View:
        """One raw value as an item."""
        return self.transform(value.read_bytes() if isinstance(value, Path) else value)


def load(folder: str | Path, view: str | None = None, trust: bool = False) -> Exported:
    """A view of an export, in evaluation mode on the CPU; `view` may be left out where the folder holds one.

    Runs no code that the folder names, unless `trust` says that it may. ValueError: no export there, no such view,
    another format, or a class outside of this package that is not trusted.
    """
    folder = Path(folder)
    known = exported_views(folder)
    if view is None and len(known) > 1:
        raise ValueError(f"{str(folder)!r} holds the views {', '.join(known)}; say which one: load(folder, view=...)")
    if view is not None and view not in known:
        raise ValueError(f"{str(folder)!r}: {unknown('view', view, known)}")
    source = known[view or next(iter(known))]
    config = json.loads((source / "config.json").read_text())
    check_format("export", config.get("format"), source)
    config = replace_text(config, FOLDER, str(source.absolute()))
    with trusting(trust):
        tower = TowerConfig.model_validate(config["tower"])
        preprocessing = views.registry.parse(config["preprocessing"])
    heads = config.get("heads", 1)  # exports from before there were several say nothing
    exported = Exported(config["view"], preprocessing, tower, config["dim"], heads)
    exported.tower.load_state_dict(load_file(source / "model.safetensors"))
    return exported.eval()


def exported_views(folder: str | Path) -> dict[str, Path]:
    """Folder of each view of an export, or of the one view whose folder this is.

    ValueError: it is no export, or what it calls a view is no name.
    """
    folder = Path(folder)
    single = (folder / "config.json").is_file()
    sources = [folder] if single else sorted(path.parent for path in folder.glob("*/config.json"))
    if not sources:
        raise ValueError(
            f"{str(folder)!r} is no export: it holds no config.json and no folder with one; "
            "write one with `mvpretrain export RUN OUT`"
        )
    found = {}
    for source in sources:
        name = json.loads((source / "config.json").read_text()).get("view")
        check_name(f"{str(source / 'config.json')!r} is of no view of an export: view", name)
        found[name] = source
    return found


def replace_text(value: Any, old: str, new: str) -> Any:
    """The same structure with `old` replaced by `new` in every string."""
    if isinstance(value, dict):
        return {k: replace_text(v, old, new) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_text(v, old, new) for v in value]
    return value.replace(old, new) if isinstance(value, str) else value

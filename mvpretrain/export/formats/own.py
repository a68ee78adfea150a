"""This package's own format: a folder a view with `model.safetensors` and `config.json`, read by `mvpretrain.load`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mvpretrain.export.encoder import FOLDER, load, replace_text
from mvpretrain.export.formats import FormatConfig, Trained
from mvpretrain.files import FORMATS
from mvpretrain.model.tower import TowerConfig
from mvpretrain.types import View

USAGE = """```python
import mvpretrain
encoder = mvpretrain.load("{name}", view="{view}")
```

`encoder.embed(values)` takes raw values (bytes, paths, strings, PIL images, arrays) through the evaluation
preprocessing; `encoder.features(view)` is the encoder's output before the head."""


class OwnConfig(FormatConfig):
    """`<view>/model.safetensors` and `<view>/config.json`, with the files that the preprocessing needs beside them."""

    kind: Literal["own"] = "own"

    def build(self) -> Own:
        return Own()


class Own:
    """Holds every view, encoder and head, also a user's own; each view's folder stands alone."""

    def write(self, folder: Path, trained: Mapping[str, Trained]) -> None:
        for name, one in trained.items():
            write_view(folder / name, name, one)

    @torch.no_grad()
    def embed(self, folder: Path, view: str, values: Sequence[Any]) -> Tensor:
        exported = load(folder, view, trust=True)  # what was just written by a run that could be built
        items = [value if isinstance(value, View) else exported.transform(value) for value in values]
        return exported(View.stack(items))

    def usage(self, name: str, view: str) -> str:
        return USAGE.format(name=name, view=view)


def write_view(folder: Path, name: str, trained: Trained) -> None:
    """One view's folder: its tower's weights, and the settings that build tower and preprocessing anew."""
    folder.mkdir()
    tower = trained.tower
    portable = tower.config.encoder.portable(tower.encoder)
    settings = TowerConfig.model_validate({"encoder": portable, "head": tower.config.head})
    config = {
        "format": FORMATS["export"],
        "view": name,
        "dim": trained.dim,
        "heads": tower.heads,
        "preprocessing": trained.view.portable(folder).model_dump(mode="json"),
        "tower": settings.model_dump(mode="json"),
    }
    (folder / "config.json").write_text(json.dumps(replace_text(config, str(folder), FOLDER), indent=2))
    save_file({k: w.contiguous() for k, w in tower.state_dict().items()}, folder / "model.safetensors")

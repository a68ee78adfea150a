"""Contrastive pretraining of encoders on things seen through k >= 2 views.

recipe = mvpretrain.load_recipe("recipes/digits.yaml", ["steps=100"])
run = mvpretrain.train(recipe)
mvpretrain.export_run(run, "out")
encoder = mvpretrain.load("out", view="image")
objective = mvpretrain.objectives.build({"kind": "infonce"}, views=["image", "text"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvpretrain import encoders, objectives, views
    from mvpretrain.export.encoder import load
    from mvpretrain.export.write import export_run
    from mvpretrain.recipe import load as load_recipe
    from mvpretrain.training.train import train

__version__ = "0.1.0"
__all__ = ["encoders", "export_run", "load", "load_recipe", "objectives", "train", "views"]

# Imported when asked for: a user of an exported encoder must need neither DeepSpeed nor webdataset.
_HOMES = {
    "export_run": "export.write.export_run",
    "load": "export.encoder.load",
    "load_recipe": "recipe.load",
    "train": "training.train.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].rpartition(".")
        return getattr(importlib.import_module(f"mvpretrain.{module}"), attribute)
    if name in __all__:
        return importlib.import_module(f"mvpretrain.{name}")
    raise AttributeError(f"module 'mvpretrain' has no attribute {name!r}")

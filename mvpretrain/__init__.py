"""Contrastive pretraining of encoders on things seen through k >= 2 views.

recipe = mvpretrain.load_recipe("recipes/digits.yaml", ["steps=100"])
run = mvpretrain.train(recipe)
mvpretrain.export(run, "out")
encoder = mvpretrain.load("out", view="image")
objective = mvpretrain.objectives.build({"kind": "infonce"}, views=["image", "text"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvpretrain import encoders, objectives, views
    from mvpretrain.exported import load
    from mvpretrain.exporting import export
    from mvpretrain.loop import train
    from mvpretrain.recipe import load as load_recipe

__all__ = ["encoders", "export", "load", "load_recipe", "objectives", "train", "views"]

# Imported when asked for: a user of an exported encoder must need neither DeepSpeed nor webdataset.
_HOMES = {"export": "exporting.export", "load": "exported.load", "load_recipe": "recipe.load", "train": "loop.train"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(".")
        return getattr(importlib.import_module(f"mvpretrain.{module}"), attribute)
    if name in __all__:
        return importlib.import_module(f"mvpretrain.{name}")
    raise AttributeError(f"module 'mvpretrain' has no attribute {name!r}")

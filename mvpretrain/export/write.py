"""A run's encoders as a folder that stands alone, kept only if it embeds as the run does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvpretrain.config import unknown
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.export.card import card
from mvpretrain.export.formats import Format, FormatConfig, Trained, registry
from mvpretrain.files import fresh_folder
from mvpretrain.model.task import Task
from mvpretrain.model.tower import Tower
from mvpretrain.recipe import Recipe
from mvpretrain.recipe import load as load_recipe
from mvpretrain.registry import trusting
from mvpretrain.training.checkpoint import find
from mvpretrain.types import Batch, View
from mvpretrain.views import ViewConfig

ROWS, LATENT = 8, 16  # of the values that are compared


def export_run(
    run: str | Path,
    out: str | Path,
    views: Sequence[str] | None = None,
    checkpoint: str = "last",
    format: str | Mapping[str, Any] = "own",
    trust: bool = False,
) -> Path:
    """Write a run's encoders to the folder `out`, with a card and the recipe; returns `out`.

    `views` are all of the run's by default; `checkpoint` is `last`, `best` or a step's number. `format` is a kind of
    mvpretrain/export/formats, or settings with a `kind`: `own` writes `out/<view>/{model.safetensors, config.json}`.
    What was written must embed the same values as the run does, to the format's tolerance (1e-5 of a coordinate);
    else nothing is written. The run's recipe and `format` may name classes outside of this package only with `trust`.
    ValueError: no such run, checkpoint, view or format, `out` exists, or the embeddings differ.
    """
    run, out = Path(run), Path(out)
    recipe, source = load_recipe(run, trust=trust), find(run, str(checkpoint))
    with trusting(trust):
        settings = registry.parse({"kind": format} if isinstance(format, str) else dict(format))
    chosen = list(views or recipe.views)
    for name in chosen:
        if name not in recipe.views:
            raise ValueError(unknown("view", name, recipe.views))
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; give another folder, or remove it first")
    task, writer = trained_task(recipe, source), settings.build()
    trained = {
        name: Trained(recipe.views[name], cast(Tower, task.towers[task.views[name]]), recipe.row_dim())
        for name in chosen
    }
    with fresh_folder(out) as folder:
        writer.write(folder, trained)
        differences = compare(folder, writer, settings, recipe, task, chosen)
        (folder / "recipe.yaml").write_text(recipe.dump())
        usage = writer.usage(out.name, chosen[0])
        (folder / "README.md").write_text(card(out.name, recipe, source, trained, differences, usage))
    for name, difference in differences.items():
        print(f"{name}: read back, embeddings differ from the run's by at most {difference:.1e}")
    return out


def trained_task(recipe: Recipe, checkpoint: Path) -> Task:
    """The run's task with a checkpoint's towers, in evaluation mode on the CPU; the objective is left as built.

    ValueError: weights that do not fit the recipe.
    """
    task = recipe.task(SingleProcess())
    weights = load_file(checkpoint / "weights.safetensors")
    towers = {k.removeprefix("towers."): w for k, w in weights.items() if k.startswith("towers.")}
    try:
        task.towers.load_state_dict(towers)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the recipe of its run: {error}") from error
    return task.eval()


def compare(
    folder: Path, writer: Format, settings: FormatConfig, recipe: Recipe, task: Task, views: Sequence[str]
) -> dict[str, float]:
    """The largest difference of a coordinate between what was written and the run, by view.

    ValueError: more than the format's tolerance.
    """
    values = {name: example_values(view) for name, view in recipe.views.items()}
    wanted = run_embeddings(recipe, task, values)
    differences = {}
    for name in views:
        found = writer.embed(folder, name, values[name])
        differences[name] = difference = float((found - wanted[name]).abs().max())
        if not difference <= settings.tolerance:
            raise ValueError(
                f"view {name!r}, read back, embeds otherwise than the run: a coordinate differs by {difference:.2g}, "
                f"at most {settings.tolerance:g} is allowed; its view or encoder does not describe itself wholly (see "
                "portable)"
            )
    return differences


@torch.no_grad()
def run_embeddings(recipe: Recipe, task: Task, values: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """The run's own unit rows of values, by view."""
    views = {}
    for name, raw in values.items():
        transform = recipe.views[name].build(train=False)
        views[name] = View.stack([value if isinstance(value, View) else transform(value) for value in raw])
    present = {name: torch.ones(ROWS, dtype=torch.bool) for name in views}
    return task.encode(Batch(views, torch.arange(ROWS), present, torch.full((ROWS,), -1))).z


def example_values(view: ViewConfig) -> list[Any]:
    """Raw values that show random latents; items of Gaussian noise where the kind of view cannot be drawn."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((ROWS, LATENT))
    try:
        return [view.sketch(latent) for latent in latents]
    except ValueError:
        blank = view.build(train=False).blank()
        if not blank.data.is_floating_point():
            return [blank] * ROWS
        noise = random.standard_normal((ROWS, *blank.data.shape))
        return [View(torch.from_numpy(x).to(blank.data.dtype), blank.mask) for x in noise]

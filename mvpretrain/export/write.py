"""A run's encoders as folders that stand alone: safetensors, JSON, a card; kept only if they embed the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvpretrain.config import unknown
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.export.encoder import HERE, Exported, load, put
from mvpretrain.files import FORMATS, fresh_folder
from mvpretrain.model.task import Task
from mvpretrain.model.tower import Tower, TowerConfig
from mvpretrain.recipe import Recipe
from mvpretrain.recipe import load as load_recipe
from mvpretrain.training.checkpoint import find
from mvpretrain.types import Batch, Transform, View
from mvpretrain.views import ViewConfig

TOLERANCE = 1e-5  # of a coordinate of a unit row, run against export
ROWS, LATENT = 8, 16  # of the inputs that are compared


def export_run(
    run: str | Path,
    out: str | Path,
    views: Sequence[str] | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> Path:
    """Write `out/<view>/{model.safetensors, config.json}`, a card and the recipe; returns `out`.

    `views` are all of the run's by default; `checkpoint` is `last`, `best` or a step's number. Every view is read back
    with `load` and must embed the same inputs as the run does, to 1e-5 in every coordinate; else nothing is written.
    ValueError: no such run, checkpoint or view, `out` exists, or the embeddings differ.
    """
    run, out = Path(run), Path(out)
    recipe, place = load_recipe(run, trust=trust), find(run, str(checkpoint))
    chosen = list(views or recipe.views)
    for name in chosen:
        if name not in recipe.views:
            raise ValueError(unknown("view", name, recipe.views))
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; give another folder, or remove it first")
    task = trained(recipe, place)
    with fresh_folder(out) as folder:
        for name in chosen:
            write_view(folder / name, name, recipe, task)
        differences = compare(folder, chosen, recipe, task)
        (folder / "recipe.yaml").write_text(recipe.dump())
        (folder / "README.md").write_text(card(out.name, recipe, place, task, differences))
    for name, difference in differences.items():
        print(f"{name}: read back, embeddings differ from the run's by at most {difference:.1e}")
    return out


def trained(recipe: Recipe, place: Path) -> Task:
    """The run's task with a checkpoint's towers, in evaluation mode on the CPU; the objective is left as built."""
    task = recipe.task(SingleProcess())
    weights = load_file(place / "weights.safetensors")
    towers = {k.removeprefix("towers."): w for k, w in weights.items() if k.startswith("towers.")}
    try:
        task.towers.load_state_dict(towers)
    except RuntimeError as error:
        raise ValueError(f"{place} does not fit the recipe of its run: {error}") from error
    return task.eval()


def write_view(folder: Path, name: str, recipe: Recipe, task: Task) -> None:
    """One view's folder: its tower's weights, and the settings that build tower and preprocessing anew."""
    folder.mkdir()
    tower = cast(Tower, task.towers[task.views[name]])
    portable = tower.config.encoder.portable(tower.encoder)
    settings = TowerConfig.model_validate({"encoder": portable, "head": tower.config.head})
    config = {
        "format": FORMATS["export"],
        "view": name,
        "dim": recipe.dim,
        "heads": tower.heads,
        "preprocessing": recipe.views[name].portable(folder).model_dump(mode="json"),
        "tower": settings.model_dump(mode="json"),
    }
    (folder / "config.json").write_text(json.dumps(put(config, str(folder), HERE), indent=2))
    save_file({k: w.contiguous() for k, w in tower.state_dict().items()}, folder / "model.safetensors")


@torch.no_grad()
def compare(folder: Path, views: Sequence[str], recipe: Recipe, task: Task) -> dict[str, float]:
    """The largest difference of a coordinate between each view read back and the run. ValueError: more than 1e-5."""
    raw = {name: inputs(view) for name, view in recipe.views.items()}
    ours = {name: view.build(train=False) for name, view in recipe.views.items()}
    batch = Batch(
        {name: View.stack([item(ours[name], value) for value in raw[name]]) for name in raw},
        torch.arange(ROWS),
        {name: torch.ones(ROWS, dtype=torch.bool) for name in raw},
        torch.full((ROWS,), -1),
    )
    wanted = task.encode(batch).z
    differences = {}
    for name in views:
        found = again(load(folder, name, recipe.trusted), raw[name])
        differences[name] = difference = float((found - wanted[name]).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"view {name!r}, read back, embeds otherwise than the run: a coordinate differs by {difference:.2g}, "
                f"at most {TOLERANCE:g} is allowed; its view or encoder does not describe itself wholly (see portable)"
            )
    return differences


def again(exported: Exported, raw: Sequence[Any]) -> Tensor:
    return exported(View.stack([item(exported.transform, value) for value in raw]))


def inputs(view: ViewConfig) -> list[Any]:
    """Raw values that show random latents; Gaussian noise where the kind of view cannot be drawn."""
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


def item(transform: Transform, raw: Any) -> View:
    return raw if isinstance(raw, View) else transform(raw)


def card(name: str, recipe: Recipe, place: Path, task: Task, differences: Mapping[str, float]) -> str:
    """README.md of an export, with the front matter that model hubs read."""
    meta = json.loads((place / "meta.json").read_text()) if (place / "meta.json").is_file() else {}
    rows = []
    for view, difference in differences.items():
        tower = cast(Tower, task.towers[task.views[view]])
        count = sum(p.numel() for p in tower.parameters())
        kind, width = recipe.views[view].kind, cast(Any, tower.encoder).dim
        rows.append(
            f"| {view} | {kind} | {tower.config.encoder.kind} | {width} | {recipe.dim} | {count:,} | {difference:.1e} |"
        )
    data = recipe.data.model_dump(mode="json")
    sources = [data.get("train") or data["kind"]] if not isinstance(data.get("train"), list) else data["train"]
    metrics = {k: v for k, v in meta.get("metrics", {}).items() if k.startswith(("val/", "retrieval/mean"))}
    measured = "".join(f"* {key}: {value:.4f}\n" for key, value in metrics.items())
    return CARD.format(
        name=name,
        views=", ".join(differences),
        first=next(iter(differences)),
        rows="\n".join(rows),
        objective=recipe.objective.kind,
        batch=recipe.batch,
        checkpoint=place.name,
        sources="\n".join(f"* `{source}`" for source in sources),
        measured=f"\nOn held-out data at that step:\n\n{measured}" if measured else "",
    )


CARD = """---
library_name: mvpretrain
tags: [contrastive-learning, multi-view, feature-extraction]
---

# {name}

Encoders of the views {views}, trained together with mvpretrain's `{objective}` objective on global batches of {batch}
samples, from checkpoint `{checkpoint}`. Embeddings are unit rows in one shared space: their products are cosines.

```python
import mvpretrain
encoder = mvpretrain.load("{name}", view="{first}")
```

`encoder.embed(values)` takes raw values (bytes, paths, strings, PIL images, arrays) through the evaluation
preprocessing; `encoder.features(view)` is the encoder's output before the head.

| view | kind | encoder | features | dim | parameters | difference after reading back |
|---|---|---|---|---|---|---|
{rows}

Trained on:

{sources}
{measured}
`recipe.yaml` holds every setting of the run.
"""

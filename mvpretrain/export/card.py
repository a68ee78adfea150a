"""README.md of an export, with the front matter that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mvpretrain.export.formats import Trained
from mvpretrain.recipe import Recipe


def card(
    name: str,
    recipe: Recipe,
    checkpoint: Path,
    trained: Mapping[str, Trained],
    differences: Mapping[str, float],
    usage: str,
) -> str:
    """The page: how to load the export called `name`, what is in it, and what it was trained on.

    `differences` are those of embeddings between the export and the run, by view; `usage` is the format's.
    """
    meta = json.loads((checkpoint / "meta.json").read_text()) if (checkpoint / "meta.json").is_file() else {}
    metrics = {k: v for k, v in meta.get("metrics", {}).items() if k.startswith(("val/", "retrieval/mean"))}
    measured = "".join(f"* {key}: {value:.4f}\n" for key, value in metrics.items())
    return CARD.format(
        name=name,
        views=", ".join(trained),
        usage=usage,
        rows="\n".join(row(view, one, differences[view]) for view, one in trained.items()),
        objective=recipe.objective.kind,
        batch=recipe.batch,
        checkpoint=checkpoint.name,
        sources="\n".join(f"* `{source}`" for source in sources(recipe)),
        measured=f"\nOn held-out data at that step:\n\n{measured}" if measured else "",
    )


def row(name: str, trained: Trained, difference: float) -> str:
    """One view's line of the table."""
    tower = trained.tower
    count, width = sum(p.numel() for p in tower.parameters()), cast(Any, tower.encoder).dim
    kinds = f"{trained.view.kind} | {tower.config.encoder.kind}"
    return f"| {name} | {kinds} | {width} | {trained.dim} | {count:,} | {difference:.1e} |"


def sources(recipe: Recipe) -> list[Any]:
    """What the run was trained on, as its recipe says it."""
    data = recipe.data.model_dump(mode="json")
    return data["train"] if isinstance(data.get("train"), list) else [data.get("train") or data["kind"]]


CARD = """---
library_name: mvpretrain
tags: [contrastive-learning, multi-view, feature-extraction]
---

# {name}

Encoders of the views {views}, trained together with mvpretrain's `{objective}` objective on global batches of {batch}
samples, from checkpoint `{checkpoint}`. Embeddings are unit rows in one shared space: their products are cosines.

{usage}

| view | kind | encoder | features | dim | parameters | difference after reading back |
|---|---|---|---|---|---|---|
{rows}

Trained on:

{sources}
{measured}
`recipe.yaml` holds every setting of the run.
"""

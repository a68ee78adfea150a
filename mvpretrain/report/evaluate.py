"""What an export is worth: retrieval against chance, probes against untrained encoders and raw inputs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from mvpretrain.data.build import Split, open_sources
from mvpretrain.data.loader import Stream
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation._collect import Table, without_padding
from mvpretrain.evaluation._probes import knn, linear
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.export.encoder import Exported, exported_views, load
from mvpretrain.files import whole_file, write_text
from mvpretrain.model.tower import Tower
from mvpretrain.recipe import Recipe
from mvpretrain.recipe import load as load_recipe
from mvpretrain.report import drawing
from mvpretrain.types import Embeddings, View

PROBE_ROWS = 10_000  # of the training data that probes are fitted on: logistic regression takes minutes beyond
RAW_SIDE, RAW_WIDTH = 32, 4096  # larger raw inputs are averaged down to this
RAW_TOKENS = 2048  # raw text is counted token by token, ids modulo this
KINDS = ("trained", "untrained", "raw")


def evaluate_export(
    folder: str | Path, run: str | Path | None = None, seed: int = 0, trust: bool = False
) -> dict[str, Any]:
    """Measure an export on the data that its recipe names; prints tables, writes `folder/report/report.{json,md,png}`.

    Retrieval of every ordered pair on `data.eval`. Where the data has labels: linear probe and kNN on each encoder's
    features (before the head), fitted on `data.train`, tested on `data.eval`, beside the same probes on the encoder
    freshly initialised from `seed` and on the raw inputs. Shares are 0 to 1. `run` is the training run's folder, for
    its speed (default: where the recipe says it was, if it is still there). ValueError: no export, or no data.
    """
    folder = Path(folder)
    exports = {name: load(folder, name, trust) for name in exported_views(folder)}
    recipe = load_recipe(folder, trust=trust)
    test = read(recipe, "eval", exports, seed, recipe.evaluation.limit)
    if test is None:
        raise ValueError("the export's recipe names no data.eval; there is nothing to evaluate on")
    report: dict[str, Any] = {
        "samples": len(test.ids),
        "retrieval": pairs(test, recipe.evaluation.by_label),
        "probes": [],
        "samples_per_second": speed(Path(run or recipe.run)),
    }
    if bool((test.labels >= 0).any()):
        train = read(recipe, "train", exports, seed, PROBE_ROWS)
        assert train is not None
        report["probes"] = [probed(name, train, test) for name in exports if probable(name, train, test)]
    write(folder, report)
    return report


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, Markdown and a picture in `folder/report`, and as tables on the console."""
    place = folder / "report"
    place.mkdir(exist_ok=True)
    write_text(place / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(place / "report.md", drawing.markdown(folder.name, report))
    with whole_file(place / "report.png") as part:
        drawing.figure(report).savefig(part, format="png", dpi=120)
    console = Console()
    for table in drawing.tables(report):
        console.print(table)
    speed = report["samples_per_second"]
    trained = f"trained at {speed:.0f} samples/s; " if speed else ""
    console.print(f"{trained}the report with its picture: {place}", markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def read(recipe: Recipe, split: Split, exports: Mapping[str, Exported], seed: int, limit: int | None) -> Table | None:
    """One pass over a split, None where there is none; its features are `view/trained`, `/untrained` and `/raw`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = open_sources(recipe.data, recipe.views, split)
    if not sources:
        return None
    transforms = {name: (e.view.fields, e.transform) for name, e in exports.items()}
    stream = Stream(sources, transforms, recipe.batch, recipe.seed, recipe.loader)
    fresh = {name: untrained(exported, seed).to(device) for name, exported in exports.items()}
    parts = []
    for batch in stream.whole(limit):
        here = batch.to(device)
        z, features = {}, {}
        for name, exported in exports.items():
            view, known = here.views[name], exported.to(device)
            output = known.features(view)
            z[name] = known.tower.embed_features(output)
            features |= {f"{name}/{kind}": x for kind, x in zip(KINDS, (output, fresh[name](view), raw(view)))}
        parts.append(without_padding(Embeddings(z, here.ids, here.present, here.labels), features))
    return Table.cat(parts)


def untrained(exported: Exported, seed: int) -> nn.Module:
    """The encoder with fresh weights: what the architecture alone gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tower(exported.tower.config, exported.dim).encoder.eval()


def raw(view: View) -> Tensor:
    """The input itself as `b n`: images averaged to at most 32 x 32, token ids counted, other values laid flat."""
    x = view.data
    if not x.is_floating_point():
        there = torch.ones_like(x) if view.mask is None else view.mask.to(x.dtype)
        counts = torch.zeros(len(x), RAW_TOKENS, dtype=x.dtype, device=x.device)
        return counts.scatter_add_(1, x.flatten(1) % RAW_TOKENS, there.flatten(1)).float()
    if x.ndim == 4:
        x = adaptive_avg_pool2d(x, (min(x.shape[2], RAW_SIDE), min(x.shape[3], RAW_SIDE)))
    x = x.flatten(1)
    return x if x.shape[1] <= RAW_WIDTH else adaptive_avg_pool1d(x[:, None], RAW_WIDTH)[:, 0]


def pairs(table: Table, by_label: Collection[str]) -> list[dict[str, Any]]:
    """Retrieval figures, one entry an ordered pair that has queries."""
    known = dict(retrieval(table, SingleProcess(), torch.device("cpu"), by_label))
    found = []
    for u, v in permutations(table.z, 2):
        start = f"retrieval/{u}-{v}/"
        figures = {name.removeprefix(start): value for name, value in known.items() if name.startswith(start)}
        if figures["queries"]:
            found.append({"from": u, "to": v, "by_label": u in by_label or v in by_label, **figures})
    return found


def probable(name: str, train: Table, test: Table) -> bool:
    """Whether a view has labelled rows on both sides, of two classes at least."""
    fit, check = labelled(name, train), labelled(name, test)
    return bool(check.any()) and len(train.labels[fit].unique()) > 1


def labelled(name: str, table: Table) -> Tensor:
    return table.present[name] & (table.labels >= 0)


def probed(name: str, train: Table, test: Table) -> dict[str, Any]:
    """Accuracies of both probes on one view's features, untrained features and raw inputs."""
    fit, check = labelled(name, train), labelled(name, test)
    train_y, test_y = train.labels[fit], test.labels[check]
    entry: dict[str, Any] = {"view": name, "train": len(train_y), "test": len(test_y), "linear": {}, "knn": {}}
    entry["majority"] = float((test_y == train_y.mode().values).float().mean())
    for kind in KINDS:
        train_x, test_x = (t.features[f"{name}/{kind}"][rows] for t, rows in ((train, fit), (test, check)))
        entry["linear"][kind] = linear(train_x, train_y, test_x, test_y)
        entry["knn"][kind] = knn(train_x, train_y, test_x, test_y)
    return entry


def speed(run: Path) -> float | None:
    """Median samples per second over the training log, None where there is no log."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rates = [line["samples/s"] for line in lines if "samples/s" in line]
    return median(rates) if rates else None

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

from mvpretrain.data.build import Split, build_stream
from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.evaluation._collect import Table, without_padding
from mvpretrain.evaluation._probes import knn, linear
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.export.encoder import Exported, exported_views, load
from mvpretrain.files import whole_file, write_text
from mvpretrain.model.tower import Tower
from mvpretrain.recipe import Recipe
from mvpretrain.recipe import load as load_recipe
from mvpretrain.report import drawing, page
from mvpretrain.report.page import KINDS
from mvpretrain.types import Embeddings, View

PROBE_ROWS = 10_000  # of the training data that probes are fitted on: logistic regression takes minutes beyond
RAW_SIDE, RAW_WIDTH = 32, 4096  # larger raw inputs are averaged down to this
RAW_TOKENS = 2048  # raw text is counted token by token, ids modulo this


def evaluate_export(
    folder: str | Path, run: str | Path | None = None, seed: int = 0, trust: bool = False
) -> dict[str, Any]:
    """Measure an export on the data that its recipe names; prints tables, writes `folder/report/report.{json,md,png}`.

    Retrieval of every ordered pair on `data.eval`. Where the data has labels: linear probe and kNN on each encoder's
    features (before the head), fitted on `data.train`, tested on `data.eval`, beside the same probes on the encoder
    freshly initialised from `seed` and on the raw inputs. Shares are 0 to 1. `run` is the training run's folder, for
    its speed (default: where the recipe says it was, if it is still there). The export may name classes outside of this
    package, and commands as urls, only with `trust`. ValueError: no export, or no data.
    """
    folder = Path(folder)
    exports = {name: load(folder, name, trust) for name in exported_views(folder)}
    recipe = load_recipe(folder, trust=trust)
    test = embed_split(recipe, "eval", exports, seed, recipe.evaluation.limit)
    if test is None:
        raise ValueError("the export's recipe names no data.eval; there is nothing to evaluate on")
    report: dict[str, Any] = {
        "samples": len(test.ids),
        "retrieval": retrieval_pairs(test, recipe.evaluation.by_label),
        "probes": [],
        "samples_per_second": median_speed(Path(run or recipe.run)),
    }
    if bool((test.labels >= 0).any()):
        train = embed_split(recipe, "train", exports, seed, PROBE_ROWS)
        assert train is not None
        report["probes"] = [probe_view(name, train, test) for name in exports if can_probe(name, train, test)]
    write_report(folder, report)
    return report


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, Markdown and a picture in `folder/report`, and as tables on the console."""
    out = folder / "report"
    out.mkdir(exist_ok=True)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "report.md", page.markdown(folder.name, report))
    with whole_file(out / "report.png") as part:
        drawing.figure(report).savefig(part, format="png", dpi=120)
    console = Console()
    for table in page.console_tables(report):
        console.print(table)
    speed = report["samples_per_second"]
    trained = f"trained at {speed:.0f} samples/s; " if speed else ""
    console.print(f"{trained}the report with its picture: {out}", markup=False, highlight=False, soft_wrap=True)


@torch.no_grad()
def embed_split(
    recipe: Recipe, split: Split, exports: Mapping[str, Exported], seed: int, limit: int | None
) -> Table | None:
    """One pass over a split, None where there is none; its features are `view/trained`, `/untrained` and `/raw`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transforms = {name: (e.view.fields, e.transform) for name, e in exports.items()}
    stream = build_stream(
        recipe.data, recipe.views, split, recipe.batch, recipe.seed, recipe.loader, transforms=transforms
    )
    if stream is None:
        return None
    fresh = {name: untrained(exported, seed).to(device) for name, exported in exports.items()}
    for exported in exports.values():
        exported.to(device)
    parts = []
    for batch in stream.whole(limit):
        batch = batch.to(device)
        z, features = {}, {}
        for name, exported in exports.items():
            view = batch.views[name]
            output = exported.features(view)
            z[name] = exported.tower.embed_features(output)
            found = output, fresh[name](view), raw_features(view)
            features |= {f"{name}/{kind}": values for kind, values in zip(KINDS, found)}
        parts.append(without_padding(Embeddings(z, batch.ids, batch.present, batch.labels), features))
    return Table.cat(parts)


def untrained(exported: Exported, seed: int) -> nn.Module:
    """The encoder with fresh weights: what the architecture alone gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tower(exported.tower.config, exported.dim // exported.tower.heads).encoder.eval()


def raw_features(view: View) -> Tensor:
    """The input itself as `b n`: images averaged to at most 32 x 32, token ids counted, other values laid flat."""
    x = view.data
    if not x.is_floating_point():
        weights = torch.ones_like(x) if view.mask is None else view.mask.to(x.dtype)
        counts = torch.zeros(len(x), RAW_TOKENS, dtype=x.dtype, device=x.device)
        return counts.scatter_add_(1, x.flatten(1) % RAW_TOKENS, weights.flatten(1)).float()
    if x.ndim == 4:
        x = adaptive_avg_pool2d(x, (min(x.shape[2], RAW_SIDE), min(x.shape[3], RAW_SIDE)))
    x = x.flatten(1)
    return x if x.shape[1] <= RAW_WIDTH else adaptive_avg_pool1d(x[:, None], RAW_WIDTH)[:, 0]


def retrieval_pairs(table: Table, by_label: Collection[str]) -> list[dict[str, Any]]:
    """Retrieval figures, one entry an ordered pair that has queries."""
    known = dict(retrieval(table, SingleProcess(), torch.device("cpu"), by_label))
    pairs = []
    for u, v in permutations(table.z, 2):
        start = f"retrieval/{u}-{v}/"
        figures = {name.removeprefix(start): value for name, value in known.items() if name.startswith(start)}
        if figures["queries"]:
            pairs.append({"from": u, "to": v, "by_label": u in by_label or v in by_label, **figures})
    return pairs


def can_probe(name: str, train: Table, test: Table) -> bool:
    """Whether a view has labelled rows on both sides, of two classes at least."""
    fit, check = labelled(name, train), labelled(name, test)
    return bool(check.any()) and len(train.labels[fit].unique()) > 1


def labelled(name: str, table: Table) -> Tensor:
    """True for rows that have the view and a label."""
    return table.present[name] & (table.labels >= 0)


def probe_view(name: str, train: Table, test: Table) -> dict[str, Any]:
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


def median_speed(run: Path) -> float | None:
    """Median samples per second over the training log, None where there is no log."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rates = [line["samples/s"] for line in lines if "samples/s" in line]
    return median(rates) if rates else None

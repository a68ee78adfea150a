"""The report's tables and picture, from its plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"trained": "#2b6cb0", "untrained": "#a0aec0", "raw": "#d69e2e"}
MOST_BARS = 20  # pairs of views beyond this are drawn as a matrix
RETRIEVAL = "Retrieval on {samples} held-out samples, in percent; `chance` is the R@1 of a random order."
PROBES = (
    "Accuracy in percent of probes on the encoders' features before the head. `untrained` is the same encoder freshly "
    "initialised, `raw` the preprocessed input itself, `largest class` what a constant answer scores."
)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def retrieval_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["from", "to", "R@1", "R@5", "R@10", "chance", "median rank", "queries", "scored by"]]
    for pair in report["retrieval"]:
        shares = [percent(pair[key]) for key in ("R@1", "R@5", "R@10", "chance")]
        scored = "label" if pair["by_label"] else "id"
        rows.append([pair["from"], pair["to"], *shares, f"{pair['median_rank']:g}", f"{pair['queries']:.0f}", scored])
    return rows


def probe_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["view", "probe", "trained", "untrained", "raw", "largest class", "train", "test"]]
    for entry in report["probes"]:
        sizes = [percent(entry["majority"]), str(entry["train"]), str(entry["test"])]
        for probe in ("linear", "knn"):
            rows.append([entry["view"], probe, *(percent(entry[probe][kind]) for kind in COLOURS), *sizes])
    return rows


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables for a console; the second only where there are probes."""
    # Sizes stay in the written report: a terminal has 80 columns.
    pairs = [[f"{row[0]} → {row[1]}", *row[2:7], row[8]] for row in retrieval_rows(report)]
    made = [table(f"Retrieval on {report['samples']} held-out samples, percent", pairs, 1)]
    if report["probes"]:
        probes = [row[:6] for row in probe_rows(report)]
        made.append(table("Probes on the features before the head, accuracy in percent", probes, 2))
    return made


def table(title: str, rows: Sequence[Sequence[str]], names: int) -> Table:
    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(rows[0]):
        made.add_column(heading, justify="left" if index < names else "right", no_wrap=index < names)
    for row in rows[1:]:
        made.add_row(*row)
    return made


def markdown(name: str, report: Mapping[str, Any]) -> str:
    """The report as a page with GitHub tables."""
    parts = [f"# {name}", RETRIEVAL.format(samples=report["samples"]), grid(retrieval_rows(report), 2)]
    if report["probes"]:
        parts += [PROBES, grid(probe_rows(report), 2)]
    if report["samples_per_second"]:
        parts.append(f"Training ran at {report['samples_per_second']:.0f} samples a second (median over the log).")
    return "\n\n".join([*parts, "![report](report.png)\n"])


def grid(rows: Sequence[Sequence[str]], names: int) -> str:
    rule = ["---" if index < names else "---:" for index in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def figure(report: Mapping[str, Any]) -> Figure:
    """Left retrieval with chance, right probes where there are any."""
    from matplotlib.figure import Figure

    found, probes = report["retrieval"], report["probes"]
    bars = min(len(found), MOST_BARS)
    made = Figure(figsize=(13 if probes else 7, max(4.0, 1.6 + 0.4 * bars)), layout="constrained")
    axes = made.subplots(1, 2 if probes else 1, squeeze=False)[0]
    (draw_pairs if len(found) <= MOST_BARS else draw_matrix)(axes[0], found)
    axes[0].set_title(f"Retrieval on {report['samples']} samples")
    if probes:
        draw_probes(axes[1], probes)
    return made


def draw_pairs(axes: Axes, found: Sequence[Mapping[str, Any]]) -> None:
    """One bar an ordered pair: R@1 within R@10, chance as a mark."""
    names = [f"{p['from']} to {p['to']}" + (" (by label)" if p["by_label"] else "") for p in found]
    places = range(len(found))
    axes.barh(places, [p["R@10"] for p in found], color="#bee3f8", label="R@10")
    axes.barh(places, [p["R@1"] for p in found], color=COLOURS["trained"], label="R@1")
    axes.plot(
        [p["chance"] for p in found], places, "|", color="black", ms=16, mew=2, clip_on=False, label="chance of R@1"
    )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of queries; the number is R@1")
    for place, pair in zip(places, found):
        axes.text(max(pair["R@10"], pair["R@1"]) + 0.01, place, f"{pair['R@1']:.2f}", va="center")
    legend(axes, ["R@1", "R@10", "chance of R@1"])


def draw_matrix(axes: Axes, found: Sequence[Mapping[str, Any]]) -> None:
    """R@1 of every ordered pair as a matrix, for many views."""
    names = list(dict.fromkeys(p["from"] for p in found) | dict.fromkeys(p["to"] for p in found))
    values = [[float("nan")] * len(names) for _ in names]
    for pair in found:
        values[names.index(pair["from"])][names.index(pair["to"])] = pair["R@1"]
        light = "white" if pair["R@1"] > 0.5 else "black"
        where = names.index(pair["to"]), names.index(pair["from"])
        axes.text(*where, f"{pair['R@1']:.2f}", ha="center", va="center", fontsize=8, color=light)
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("from")
    chance = sum(p["chance"] for p in found) / len(found)
    axes.set_xlabel(f"to; R@1 by cell, chance {chance:.3f} on average")


def draw_probes(axes: Axes, probes: Sequence[Mapping[str, Any]]) -> None:
    """Per view, the linear probe's accuracy as bars, kNN's as dots, the largest class as a line."""
    for index, kind in enumerate(COLOURS):
        places = [p + 0.27 * (index - 1) for p in range(len(probes))]
        bars, dots = ([entry[probe][kind] for entry in probes] for probe in ("linear", "knn"))
        axes.bar(places, bars, width=0.25, color=COLOURS[kind], label=kind)
        axes.plot(places, dots, "o", color="black", ms=5, label=None if index else "kNN")
        for place, bar, dot in zip(places, bars, dots):
            turn = 90 if len(probes) > 4 else 0
            axes.text(place, max(bar, dot) + 0.02, f"{bar:.2f}", ha="center", va="bottom", fontsize=9, rotation=turn)
    lows, highs = ([p + side for p in range(len(probes))] for side in (-0.42, 0.42))
    majority = [entry["majority"] for entry in probes]
    axes.hlines(majority, lows, highs, color="black", ls="--", lw=1, label="largest class")
    axes.set_xticks(range(len(probes)), [entry["view"] for entry in probes])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("accuracy; bars are the linear probe")
    axes.set_title("Probes on features before the head")
    legend(axes, [*COLOURS, "kNN", "largest class"])


def legend(axes: Axes, names: Sequence[str]) -> None:
    """The named entries, in this order, below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    found = [handles[labels.index(name)] for name in names]
    axes.legend(found, names, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(names), frameon=False)

"""The report's picture, from its plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mvpretrain.report.page import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(KINDS, ("#2b6cb0", "#a0aec0", "#d69e2e")))
MOST_BARS = 20  # pairs of views beyond this are drawn as a matrix


def figure(report: Mapping[str, Any]) -> Figure:
    """Left retrieval with chance, right probes where there are any."""
    from matplotlib.figure import Figure

    pairs, probes = report["retrieval"], report["probes"]
    bars = min(len(pairs), MOST_BARS)
    drawn = Figure(figsize=(13 if probes else 7, max(4.0, 1.6 + 0.4 * bars)), layout="constrained")
    axes = drawn.subplots(1, 2 if probes else 1, squeeze=False)[0]
    (draw_pairs if len(pairs) <= MOST_BARS else draw_matrix)(axes[0], pairs)
    axes[0].set_title(f"Retrieval on {report['samples']} samples")
    if probes:
        draw_probes(axes[1], probes)
    return drawn


def draw_pairs(axes: Axes, pairs: Sequence[Mapping[str, Any]]) -> None:
    """One bar an ordered pair: R@1 within R@10, chance as a mark."""
    names = [f"{pair['from']} to {pair['to']}" + (" (by label)" if pair["by_label"] else "") for pair in pairs]
    first, tenth, chance = ([pair[key] for pair in pairs] for key in ("R@1", "R@10", "chance"))
    axes.barh(names, first, color=COLOURS["trained"], label="R@1", zorder=2)
    behind = axes.barh(names, tenth, color="#bee3f8", label="R@10", zorder=1)
    axes.bar_label(behind, [f"{value:.2f}" for value in first], padding=4)
    mark = {"color": "black", "ms": 16, "mew": 2, "clip_on": False, "zorder": 3}
    axes.plot(chance, names, "|", label="chance of R@1", **mark)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of queries; the number is R@1")
    legend_below(axes)


def draw_matrix(axes: Axes, pairs: Sequence[Mapping[str, Any]]) -> None:
    """R@1 of every ordered pair as a matrix, for many views."""
    names = list(dict.fromkeys(p["from"] for p in pairs) | dict.fromkeys(p["to"] for p in pairs))
    values = [[float("nan")] * len(names) for _ in names]
    for pair in pairs:
        row, column = names.index(pair["from"]), names.index(pair["to"])
        values[row][column] = pair["R@1"]
        colour = "white" if pair["R@1"] > 0.5 else "black"
        axes.text(column, row, f"{pair['R@1']:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("from")
    chance = sum(p["chance"] for p in pairs) / len(pairs)
    axes.set_xlabel(f"to; R@1 by cell, chance {chance:.3f} on average")


def draw_probes(axes: Axes, probes: Sequence[Mapping[str, Any]]) -> None:
    """By view the linear probe's accuracy as bars, kNN's as dots, the largest class as a line."""
    middles, dots = [], []
    for index, kind in enumerate(KINDS):
        places = [place + 0.27 * (index - 1) for place in range(len(probes))]
        values = [entry["linear"][kind] for entry in probes]
        axes.bar(places, values, width=0.25, color=COLOURS[kind], label=kind)
        written = {"color": "white" if kind == "trained" else "black", "fontsize": 9, "ha": "center", "va": "center"}
        for place, value in zip(places, values):  # low in the bar, where no dot is
            axes.text(place, 0.3 * value, f"{value:.2f}", rotation=90 * (len(probes) > 4), **written)
        middles += places
        dots += [entry["knn"][kind] for entry in probes]
    axes.plot(middles, dots, "o", color="black", ms=5, label="kNN")
    lows, highs = ([place + side for place in range(len(probes))] for side in (-0.42, 0.42))
    axes.hlines([e["majority"] for e in probes], lows, highs, color="black", ls="--", lw=1, label="largest class")
    axes.set_xticks(range(len(probes)), [entry["view"] for entry in probes])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("accuracy; bars are the linear probe")
    axes.set_title("Probes on features before the head")
    legend_below(axes)


def legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False)

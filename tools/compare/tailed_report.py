"""The tables and plots of tools/compare/tailed.py, from the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvpretrain.report.page import markdown_table
from tools.compare.experiment import Result
from tools.compare.experiment_report import Findings, Spread, over_seeds, page, percent, quiet, save, steps_ms
from tools.compare.tailed_run import AUGMENTED, AXIS, DATA, OBJECTIVES, THIRDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINEAR = {f"linear/{part}": f"linear probe, {part}" for part in ("all", *THIRDS)}
KNN = {f"knn/{part}": f"kNN, {part}" for part in ("all", *THIRDS)}
SCORES = {**LINEAR, **KNN, "pairs": "view to view"}
LEGEND = """\
Percent, mean ± standard deviation over seeds (of towers and batches); the number of seeds is in the last column.
Objectives of one data set share towers, initial weights by seed, batches, steps, optimiser and schedule. Training sees
a long tail of the classes and no label; the samples that probes are fitted on and those that all is tested on are
balanced, held out, and not augmented.

- linear probe, kNN: accuracy of logistic regression, and of the 20 nearest neighbours by cosine, on the encoders'
  features before the head; where several views are probed, the mean over them.
- head, middle, tail: of test samples of the most frequent, the middle and the rarest third of the classes in training.
  Classes differ in difficulty, also for towers as they start: compare objectives within a column, not columns.
- view to view: R@1 in the shared space, mean over all ordered pairs of views.
- temperature: the last one that was logged, of objectives that have one for all or log the mean.
- step: milliseconds from the log, first records left out; the objective's forward part of it beside. Where several runs
  shared the machine, times are of that machine.
- untrained: the same towers as they start."""
TEMPERATURES = """\
Mean over a class's training samples of the temperature that each has learned, mean ± standard deviation over seeds,
classes from the most frequent to the rarest, with their training samples."""


def write(out: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """`out/comparison.{json,md,png}`, `temperatures.png` and `augmentations.png`, as far as there are results."""
    found = Findings(results, DATA | AXIS, OBJECTIVES)
    drawn = {
        "comparison": comparison(found, main_sets(found)),
        "temperatures": temperatures(found, learned(found)),
        "augmentations": augmentations(found),
    }
    figures = {name: figure for name, figure in drawn.items() if figure}
    save(out, found, about, [*SCORES, "chance"], markdown(found, about, list(figures)))
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)


def main_sets(found: Findings) -> list[str]:
    return [name for name in found.data_sets() if name in DATA]


def learned(found: Findings) -> dict[str, list[str]]:
    """Data set -> objectives whose samples have temperatures of their own."""
    by_data = {
        name: [o for o in found.compared(name) if any(found.values(name, o, "temperatures"))]
        for name in main_sets(found)
    }
    return {name: compared for name, compared in by_data.items() if compared}


def markdown(found: Findings, about: Mapping[str, Any], figures: Sequence[str]) -> str:
    parts = [LEGEND]
    for data in main_sets(found):
        parts += [f"## {data}", found.described(data), markdown_table(score_rows(found, data), 2)]
        if compared := learned(found).get(data):
            parts += [TEMPERATURES, markdown_table(temperature_rows(found, data, compared), 1)]
    if len(rows := axis_rows(found)) > 1:
        kinds = "Numbers of augmentations, each added to those before: crop, flip, colour jitter, grey, blur."
        parts += ["## cifar10 by augmentation", kinds, markdown_table(rows, 2)]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return page("Objectives on a long tail of classes", about, parts)


def score_rows(found: Findings, data: str) -> list[list[str]]:
    names = [name for name in SCORES if any(found.spread(data, o, name) for o in found.compared(data))]
    rows = [["objective", "settings", *(SCORES[name] for name in names), "temperature", "step, ms", "objective, ms"]]
    rows[0].append("seeds")
    for objective in found.compared(data):
        scores = [percent(found.spread(data, objective, name)) for name in names]
        costs = found.values(data, objective, "cost")
        own = [cost["phases"]["objective"] for cost in costs if cost]
        last = [cost["last"]["temperature"] for cost in costs if "temperature" in cost.get("last", {})]
        columns = ((last, ".3f"), (steps_ms(costs), ".0f"), (own, ".1f"))
        figures = [format(statistics.mean(x), how) if x else "" for x, how in columns]
        rows.append([objective, found.setting(objective), *scores, *figures, str(len(costs))])
    return rows


def by_frequency(found: Findings, data: str) -> list[tuple[str, int]]:
    """(class, training samples), the most frequent first."""
    counts = next(r["frequency"] for r in found.runs if r["data"] == data)
    return [(str(label), counts[label]) for label in sorted(range(len(counts)), key=lambda c: -counts[c])]


def class_temperatures(found: Findings, data: str, objective: str) -> dict[str, Spread]:
    """Class -> its samples' mean temperature."""
    by_seed = found.values(data, objective, "temperatures")
    values = {label: [t[label]["mean"] for t in by_seed if label in t] for label, _ in by_frequency(found, data)}
    return {label: over_seeds(x) for label, x in values.items() if x}


def temperature_rows(found: Findings, data: str, compared: Sequence[str]) -> list[list[str]]:
    classes = by_frequency(found, data)
    rows = [["objective", *(f"{label}: {count:,}" for label, count in classes)]]
    for objective in compared:
        own = class_temperatures(found, data, objective)
        rows.append([objective, *(decimals(own[label]) if label in own else "" for label, _ in classes)])
    return rows


def decimals(s: Spread) -> str:
    return f"{s.mean:.3f}" + ("" if s.std is None else f" ± {s.std:.3f}")


def axis_rows(found: Findings) -> list[list[str]]:
    rows = [["augmentations", "objective", *LINEAR.values(), KNN["knn/all"], "seeds"]]
    for kinds, data in enumerate(AXIS, 1):
        for objective in found.compared(data):
            spreads = [found.spread(data, objective, name) for name in (*LINEAR, "knn/all")]
            count = str(len(found.values(data, objective, "scores")))
            rows.append([str(kinds), objective, *map(percent, spreads), count])
    return rows


def comparison(found: Findings, data: Sequence[str]) -> Figure | None:
    """One row a data set: accuracy of the linear probe, left, and of kNN, right, by third of the classes."""
    if not data:
        return None
    from matplotlib.figure import Figure

    made = Figure(figsize=(17, 3.6 * len(data) + 0.8), layout="constrained")
    panels = made.subplots(len(data), 2, squeeze=False)
    for name, row in zip(data, panels):
        for axes, probe, metrics in zip(row, ("linear probe", "kNN"), (LINEAR, KNN)):
            found.draw(axes, name, {key: text.partition(", ")[2] for key, text in metrics.items()})
            axes.set_title(f"{name}: accuracy of {probe} by third of the classes, percent", fontsize=11)
    found.legend(made, panels.flat)
    return made


def temperatures(found: Findings, compared: Mapping[str, Sequence[str]]) -> Figure | None:
    """One panel a data set: learned temperature against the class's training samples, one line an objective."""
    if not compared:
        return None
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.2 * len(compared) + 0.5, 4.4), layout="constrained")
    panels = made.subplots(1, len(compared), squeeze=False)[0]
    for axes, (data, names) in zip(panels, compared.items()):
        counts = dict(by_frequency(found, data))
        for objective in names:
            own = class_temperatures(found, data, objective)
            x, y = [counts[label] for label in own], [s.mean for s in own.values()]
            bars = [s.std or 0 for s in own.values()]
            axes.errorbar(x, y, bars, fmt="o-", ms=5, capsize=3, color=found.colour(objective), label=objective)
        axes.set_xscale("log")
        axes.set_xlabel("training samples of the class")
        axes.set_title(data, fontsize=11)
        quiet(axes)
    panels[0].set_ylabel("mean temperature of the class's samples")
    found.legend(made, panels)
    return made


def augmentations(found: Findings) -> Figure | None:
    """Accuracy against the number of augmentations: of all classes, left, and of the rarest third."""
    if not any(name in AXIS for name in found.data_sets()):
        return None
    from matplotlib.figure import Figure

    made = Figure(figsize=(11, 4.4), layout="constrained")
    panels = made.subplots(1, 2)
    for axes, part in zip(panels, ("all", "tail")):
        for place, objective in enumerate(AUGMENTED):
            draw_axis(axes, found, objective, f"linear/{part}", 0.06 * (place - (len(AUGMENTED) - 1) / 2))
        axes.set_xticks(range(1, 6), ["crop", "+ flip", "+ jitter", "+ grey", "+ blur"])
        axes.set_title(f"cifar10: accuracy of linear probe, {part} classes, percent", fontsize=11)
        quiet(axes)
    found.legend(made, panels)
    return made


def draw_axis(axes: Axes, found: Findings, objective: str, name: str, shift: float) -> None:
    """One objective's line; `shift` keeps its bars from those of another."""
    spreads = {kinds: s for kinds, data in enumerate(AXIS, 1) if (s := found.spread(data, objective, name))}
    if spreads:
        means, bars = zip(*((100 * s.mean, 100 * (s.std or 0)) for s in spreads.values()))
        places, colour = [kinds + shift for kinds in spreads], found.colour(objective)
        axes.errorbar(places, means, bars, fmt="o-", ms=5, capsize=3, color=colour, label=objective)

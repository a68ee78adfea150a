"""The table and the plot of tools/compare_objectives.py, from the results of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from objectives_run import BUDGETS, DATA, DRAWS, OBJECTIVES, REPEATS

from mvpretrain import objectives
from mvpretrain.evaluation.drawing import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
PROBES = {
    **{f"linear/{n}": f"linear probe, {n} a class" for n in BUDGETS},
    "linear/all": "linear probe, all labels",
}
RETRIEVAL = {"pairs": "view to view", "rest": "mean of the others to a view", "product": "product of the others"}
COLOURS = ("#2b6cb0", "#90cdf4", "#c05621", "#d69e2e", "#2f855a", "#805ad5", "#718096")
LEGEND = f"""\
Percent, mean ± standard deviation over seeds (of towers, batches and labelled samples); the number of seeds is in the
last column. Objectives of one data set share towers, initial weights by seed, batches, steps, optimiser and schedule;
each has the temperature that is given with it. All are on held-out samples.

- linear probe: accuracy of logistic regression on the encoders' features before the head, from so many labelled samples
  a class (mean of {DRAWS} draws); where several views are probed, the mean over them.
- view to view: R@1 in the shared space, mean over all ordered pairs of views.
- mean, product of the others: R@1 of each view from all of the others, their normalised mean or their product
  coordinate by coordinate as the query, mean over the views.
- untrained: the same towers as they start."""
COSTS = f"""\
Cost: milliseconds a step from the log, first records left out; `objective, share` is the objective's forward part of
the step (its backward part is in `backward`); `objective alone` is loss and gradient of one batch of trained held-out
rows, median of {REPEATS}. `temperature` is the last one that was logged (of Symile its scale, a factor), `sweeps` and
`error` are those of M3G's last logged step. Where several runs shared the machine, times are of that machine."""


class Spread(NamedTuple):
    mean: float
    std: float | None  # None for one seed
    seeds: int


def write(out: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """`out/comparison.{json,md,png}`."""
    table = {
        data: {
            o: {name: s._asdict() for name in [*PROBES, *RETRIEVAL, "chance"] if (s := spread(results, data, o, name))}
            for o in listed(results, "objective", data)
        }
        for data in listed(results, "data")
    }
    whole = {**about, "summary": table, "runs": list(results)}
    (out / "comparison.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "comparison.md").write_text(markdown(results, about))
    figure(results).savefig(out / "comparison.png", dpi=120)
    print(f"{out}/comparison.md, .json and .png are of {len(results)} runs")


def listed(results: Sequence[Result], key: str, data: str | None = None) -> list[str]:
    """Data sets or objectives that have results, in their usual order."""
    found = {r[key] for r in results if data in (None, r["data"])}
    return [name for name in (*DATA, *OBJECTIVES) if name in found]


def values(results: Sequence[Result], data: str, objective: str, group: str) -> list[Mapping[str, Any]]:
    return [r[group] for r in results if r["data"] == data and r["objective"] == objective]


def spread(results: Sequence[Result], data: str, objective: str, name: str) -> Spread | None:
    found = [scores[name] for scores in values(results, data, objective, "scores")]
    if not found:
        return None
    return Spread(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def percent(s: Spread | None) -> str:
    if s is None:
        return ""
    return f"{100 * s.mean:.1f}" + ("" if s.std is None else f" ± {100 * s.std:.1f}")


def markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    parts = [
        "# Objectives for k views on real data",
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        LEGEND,
    ]
    for data in listed(results, "data"):
        parts += [f"## {data}", described(results, data), grid(score_rows(results, data), 2)]
        if len(costs := cost_rows(results, data)) > 1:
            parts.append(grid(costs, 1))
    return "\n\n".join([*parts, COSTS, "![comparison](comparison.png)\n"])


def described(results: Sequence[Result], data: str) -> str:
    """What was run: the choices of one of its runs, which all have but for objective and seed."""
    own = next(r for r in results if r["data"] == data)
    kept = [text for text in own["settings"] if not text.startswith(("objective=", "seed="))]
    chance = statistics.mean(r["scores"]["chance"] for r in results if r["data"] == data)
    sizes = own["sizes"]
    seen, train = sizes["seen"], sizes["train"]
    return (
        f"{DATA[data].note} Training sees {seen:,} samples, {seen / train:.2g} times each of {train:,}; probes are "
        f"fitted on {sizes['labelled']:,} at most; all is tested on {sizes['held_out']:,}. Chance of R@1: "
        f"{100 * chance:.1f} %.\n\n"
        f"recipes/{DATA[data].recipe}.yaml with `{'` `'.join(kept)}`"
    )


def score_rows(results: Sequence[Result], data: str) -> list[list[str]]:
    rows = [["objective", "settings", *PROBES.values(), *RETRIEVAL.values(), "seeds"]]
    for objective in listed(results, "objective", data):
        found = [spread(results, data, objective, name) for name in (*PROBES, *RETRIEVAL)]
        count = str(len(values(results, data, objective, "scores")))
        rows.append([objective, setting(objective), *map(percent, found), count])
    return rows


def setting(objective: str) -> str:
    """What is set beside the kind, as a recipe writes it, or where a temperature starts by default."""
    chosen = OBJECTIVES[objective]
    if chosen is None:
        return ""
    own = {key: value for key, value in chosen.items() if key != "kind"}
    if not own:
        defaults = objectives.door.parse(chosen).model_dump()
        own = {f"default {key}": defaults[key]["init"] for key in ("temperature", "scale") if key in defaults}
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in own.items()).replace('"', "")


def cost_rows(results: Sequence[Result], data: str) -> list[list[str]]:
    rows = [["objective", "step, ms", "objective, share", "backward, share", "objective alone, ms"]]
    rows[0] += ["temperature", "sweeps", "error"]
    for objective in listed(results, "objective", data):
        costs = [cost for cost in values(results, data, objective, "cost") if cost]
        if costs:
            rows.append([objective, *cost_cells(costs)])
    return rows


def cost_cells(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of one objective, means over its seeds; empty where the log does not say."""
    phases = [cost["phases"] for cost in costs if cost["phases"]]
    steps = [sum(p.values()) for p in phases]
    shares = [[100 * p[name] / step for p, step in zip(phases, steps)] for name in ("objective", "backward") if phases]
    last = [logged(cost["last"]) for cost in costs]
    ended = [
        [record[name] for record in last if name in record] for name in ("temperature", "sweeps", "marginal_error")
    ]
    columns = [
        (steps, ".0f"),
        *((share, ".1f") for share in shares or [[], []]),
        ([cost["objective_ms"] for cost in costs], ".1f"),
        (ended[0], ".3g"),
        (ended[1], ".1f"),
        (ended[2], ".1e"),
    ]
    units = ("", " %", " %", "", "", "", "")
    return [format(statistics.mean(x), how) + unit if x else "" for (x, how), unit in zip(columns, units)]


def logged(record: Mapping[str, float]) -> Mapping[str, float]:
    """The record with its scale as the temperature, where the objective has no other."""
    return {"temperature": record["scale"], **record} if "scale" in record else record


def figure(results: Sequence[Result]) -> Figure:
    """One row a data set: left probes, right retrieval; bars of one standard deviation."""
    from matplotlib.figure import Figure

    data = listed(results, "data")
    made = Figure(figsize=(13, 3.4 * len(data) + 0.8), layout="constrained")
    panels = made.subplots(len(data), 2, squeeze=False)
    for name, (left, right) in zip(data, panels):
        draw(left, results, name, PROBES)
        draw(right, results, name, RETRIEVAL)
        left.set_title(f"{name}: accuracy of linear probes, percent", fontsize=11)
        right.set_title(f"{name}: retrieval, R@1 in percent", fontsize=11)
        chance = statistics.mean(r["scores"]["chance"] for r in results if r["data"] == name)
        right.axhline(100 * chance, color="black", ls=":", lw=1, label="chance of R@1")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels())}
    names = [o for o in (*OBJECTIVES, "chance of R@1") if o in handles]
    made.legend([handles[o] for o in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    return made


def draw(axes: Axes, results: Sequence[Result], data: str, metrics: Mapping[str, str]) -> None:
    """Points with error bars, one group a metric, one colour an objective."""
    known = listed(results, "objective", data)
    for i, objective in enumerate(known):
        found = [s for name in metrics if (s := spread(results, data, objective, name))]
        places = [group + 0.8 * ((i + 0.5) / len(known) - 0.5) for group in range(len(found))]
        means, bars = ([100 * (x or 0) for x in column] for column in zip(*((s.mean, s.std) for s in found)))
        colour = COLOURS[list(OBJECTIVES).index(objective) % len(COLOURS)]
        axes.errorbar(places, means, bars, fmt="o", ms=6, capsize=3, color=colour, label=objective)
        for place, mean, bar in zip(places, means, bars):
            axes.annotate(
                f"{mean:.1f}", (place, mean + bar), (0, 3), textcoords="offset points", ha="center", fontsize=7
            )
    axes.set_xticks(range(len(metrics)), list(metrics.values()))
    for edge in range(1, len(metrics)):
        axes.axvline(edge - 0.5, color="#e2e8f0", lw=1)
    axes.margins(y=0.15)
    axes.grid(axis="y", color="#edf2f7")
    axes.set_axisbelow(True)

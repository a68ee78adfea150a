"""The table and the plot of tools/compare/objectives.py, from the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvpretrain.report.page import markdown_table
from tools.compare.experiment import Result
from tools.compare.experiment_report import Findings, page, percent, save, steps_ms
from tools.compare.objectives_run import BUDGETS, DATA, DRAWS, OBJECTIVES, REPEATS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBES = {
    **{f"linear/{n}": f"linear probe, {n} a class" for n in BUDGETS},
    "linear/all": "linear probe, all labels",
}
RETRIEVAL = {"pairs": "view to view", "rest": "mean of the others to a view", "product": "product of the others"}
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
rows, median of {REPEATS}. `temperature` is the last one that was logged (of Symile its scale, a factor), `Newton steps`
and `gradient error`, as estimated, are those of M3G's last logged step. Where several runs shared the machine, times
are of that machine."""


def write(out: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """`out/comparison.{json,md,png}`."""
    save(out, gathered(results), about, [*PROBES, *RETRIEVAL, "chance"], markdown(results, about))
    figure(results).savefig(out / "comparison.png", dpi=120)


def gathered(results: Sequence[Result]) -> Findings:
    return Findings(results, DATA, OBJECTIVES)


def markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    found, parts = gathered(results), [LEGEND]
    for data in found.data_sets():
        parts += [f"## {data}", found.described(data), markdown_table(score_rows(found, data), 2)]
        if len(costs := cost_rows(found, data)) > 1:
            parts.append(markdown_table(costs, 1))
    return page("Objectives for k views on real data", about, [*parts, COSTS, "![comparison](comparison.png)"])


def score_rows(found: Findings, data: str) -> list[list[str]]:
    rows = [["objective", "settings", *PROBES.values(), *RETRIEVAL.values(), "seeds"]]
    for objective in found.compared(data):
        scores = [percent(found.spread(data, objective, name)) for name in (*PROBES, *RETRIEVAL)]
        count = str(len(found.values(data, objective, "scores")))
        rows.append([objective, found.setting(objective), *scores, count])
    return rows


def cost_rows(found: Findings, data: str) -> list[list[str]]:
    rows = [["objective", "step, ms", "objective, share", "backward, share", "objective alone, ms"]]
    rows[0] += ["temperature", "Newton steps", "gradient error"]
    for objective in found.compared(data):
        costs = [cost for cost in found.values(data, objective, "cost") if cost]
        if costs:
            rows.append([objective, *cost_cells(costs)])
    return rows


def cost_cells(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of one objective, means over its seeds; empty where the log does not say."""
    phases = [cost["phases"] for cost in costs if cost["phases"]]
    steps = steps_ms(costs)
    shares = [[100 * p[name] / step for p, step in zip(phases, steps)] for name in ("objective", "backward") if phases]
    last = [logged(cost["last"]) for cost in costs]
    ended = [
        [record[name] for record in last if name in record]
        for name in ("temperature", "newton_steps", "gradient_error")
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

    found = gathered(results)
    data = found.data_sets()
    made = Figure(figsize=(13, 3.4 * len(data) + 0.8), layout="constrained")
    panels = made.subplots(len(data), 2, squeeze=False)
    for name, (left, right) in zip(data, panels):
        found.draw(left, name, PROBES)
        found.draw(right, name, RETRIEVAL)
        left.set_title(f"{name}: accuracy of linear probes, percent", fontsize=11)
        right.set_title(f"{name}: retrieval, R@1 in percent", fontsize=11)
        chance = statistics.mean(r["scores"]["chance"] for r in results if r["data"] == name)
        right.axhline(100 * chance, color="black", ls=":", lw=1, label="chance of R@1")
    found.legend(made, panels.flat, "chance of R@1")
    return made

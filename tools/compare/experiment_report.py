"""What the reports of objectives.py and tailed.py have alike: means and spreads over seeds, printed and drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvpretrain import objectives
from tools.compare.experiment import DataSet, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#2b6cb0", "#90cdf4", "#c05621", "#d69e2e", "#2f855a"),
    *("#805ad5", "#d53f8c", "#38b2ac", "#4a5568", "#9b2c2c"),
)
UNTRAINED = "#a0aec0"
NUMBERED = 8  # objectives side by side, beyond which their numbers would overlap


class Spread(NamedTuple):
    mean: float
    std: float | None  # None for one seed
    seeds: int


class Findings(NamedTuple):
    """Results of runs, and all data sets and objectives in the order in which they are listed."""

    runs: Sequence[Result]
    data: Mapping[str, DataSet]
    objectives: Mapping[str, Mapping[str, Any] | None]

    def data_sets(self) -> list[str]:
        """Those that have results."""
        found = {r["data"] for r in self.runs}
        return [name for name in self.data if name in found]

    def compared(self, data: str) -> list[str]:
        """The objectives that have results on a data set."""
        found = {r["objective"] for r in self.runs if r["data"] == data}
        return [name for name in self.objectives if name in found]

    def values(self, data: str, objective: str, group: str) -> list[Mapping[str, Any]]:
        return [r[group] for r in self.runs if r["data"] == data and r["objective"] == objective]

    def spread(self, data: str, objective: str, name: str) -> Spread | None:
        """Over seeds; None where nothing was measured under this name."""
        found = [scores[name] for scores in self.values(data, objective, "scores") if name in scores]
        return over_seeds(found) if found else None

    def summary(self, names: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
        """Data set -> objective -> name -> mean, std, seeds."""
        names = list(names)
        return {
            data: {
                o: {name: s._asdict() for name in names if (s := self.spread(data, o, name))}
                for o in self.compared(data)
            }
            for data in self.data_sets()
        }

    def setting(self, objective: str) -> str:
        """What is set beside the kind, as a recipe writes it, or where a temperature starts by default."""
        chosen = self.objectives[objective]
        if chosen is None:
            return ""
        own = {key: value for key, value in chosen.items() if key != "kind"}
        if not own:
            defaults = objectives.registry.parse(chosen).model_dump()
            starts = {key: defaults.get(key) for key in ("temperature", "scale")}
            own = {f"default {key}": x["init"] for key, x in starts.items() if isinstance(x, dict) and "init" in x}
        return ", ".join(f"{key} {json.dumps(value)}" for key, value in own.items()).replace('"', "")

    def described(self, data: str) -> str:
        """What was run: the note, the numbers of samples, and the choices that all objectives share."""
        own, chosen = next(r for r in self.runs if r["data"] == data), self.data[data]
        kept = [text for text in own["settings"] if not text.startswith(("objective=", "seed="))]
        sizes = own["sizes"]
        seen, train = sizes["seen"], sizes["train"]
        chances = [r["scores"]["chance"] for r in self.runs if r["data"] == data and "chance" in r["scores"]]
        chance = f" Chance of R@1: {100 * statistics.mean(chances):.1f} %." if chances else ""
        extra = [f"; {kind} with `{json.dumps(own)}`" for kind, own in chosen.objective.items()]
        return (
            f"{chosen.note} Training sees {seen:,} samples, {seen / train:.2g} times each of {train:,}; probes are "
            f"fitted on {sizes['labelled']:,} at most; all is tested on {sizes['held_out']:,}.{chance}\n\n"
            f"recipes/{chosen.recipe}.yaml with `{'` `'.join(kept)}`{''.join(extra)}"
        )

    def colour(self, objective: str) -> str:
        if self.objectives[objective] is None:
            return UNTRAINED
        return COLOURS[list(self.objectives).index(objective) % len(COLOURS)]

    def draw(self, axes: Axes, data: str, metrics: Mapping[str, str]) -> None:
        """Points with error bars in percent, one group a metric, one colour an objective."""
        known = self.compared(data)
        for i, objective in enumerate(known):
            found = [s for name in metrics if (s := self.spread(data, objective, name))]
            places = [group + 0.8 * ((i + 0.5) / len(known) - 0.5) for group in range(len(found))]
            means, bars = ([100 * (x or 0) for x in column] for column in zip(*((s.mean, s.std) for s in found)))
            axes.errorbar(places, means, bars, fmt="o", ms=6, capsize=3, color=self.colour(objective), label=objective)
            for place, mean, bar in zip(places, means, bars) if len(known) <= NUMBERED else ():
                axes.annotate(
                    f"{mean:.1f}", (place, mean + bar), (0, 3), textcoords="offset points", ha="center", fontsize=7
                )
        axes.set_xticks(range(len(metrics)), list(metrics.values()))
        for edge in range(1, len(metrics)):
            axes.axvline(edge - 0.5, color="#e2e8f0", lw=1)
        axes.margins(y=0.15)
        quiet(axes)

    def legend(self, figure: Figure, panels: Iterable[Axes], *others: str) -> None:
        """One legend below all panels: objectives in their order, then the other labels."""
        handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels())}
        names = [o for o in (*self.objectives, *others) if o in handles]
        shown = [handles[o] for o in names]
        figure.legend(shown, names, loc="outside lower center", ncols=len(names), frameon=False)


def over_seeds(found: Sequence[float]) -> Spread:
    return Spread(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def quiet(axes: Axes) -> None:
    """Horizontal lines below what is drawn."""
    axes.grid(axis="y", color="#edf2f7")
    axes.set_axisbelow(True)


def percent(s: Spread | None) -> str:
    if s is None:
        return ""
    return f"{100 * s.mean:.1f}" + ("" if s.std is None else f" ± {100 * s.std:.1f}")


def steps_ms(costs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Milliseconds a step of each run that was trained."""
    return [sum(cost["phases"].values()) for cost in costs if cost.get("phases")]


def page(title: str, about: Mapping[str, Any], parts: Iterable[str]) -> str:
    """A markdown page that opens with how it was made."""
    return "\n\n".join([f"# {title}", "\n".join(f"- {key}: {value}" for key, value in about.items()), *parts]) + "\n"


def save(out: Path, findings: Findings, about: Mapping[str, Any], names: Iterable[str], text: str) -> None:
    """`out/comparison.md`, and `.json` with every run and the summary of the named scores."""
    whole = {**about, "summary": findings.summary(names), "runs": list(findings.runs)}
    (out / "comparison.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "comparison.md").write_text(text)

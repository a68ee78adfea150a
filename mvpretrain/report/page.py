"""The report as tables for a console and as a page, from its plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

KINDS = ("trained", "untrained", "raw")  # of the features that probes are fitted on
RETRIEVAL = "Retrieval on {samples} held-out samples, in percent; `chance` is the R@1 of a random order."
PROBES = (
    "Accuracy in percent of probes on the encoders' features before the head. `untrained` is the same encoder freshly "
    "initialised, `raw` the preprocessed input itself, `largest class` what a constant answer scores."
)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def retrieval_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """The headings, then a line for each ordered pair of views."""
    lines = [["from", "to", "R@1", "R@5", "R@10", "chance", "median rank", "queries", "scored by"]]
    for pair in report["retrieval"]:
        shares = [percent(pair[key]) for key in ("R@1", "R@5", "R@10", "chance")]
        scored = "label" if pair["by_label"] else "id"
        lines.append([pair["from"], pair["to"], *shares, f"{pair['median_rank']:g}", f"{pair['queries']:.0f}", scored])
    return lines


def probe_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """The headings, then two lines for each view: the linear probe and kNN."""
    lines = [["view", "probe", *KINDS, "largest class", "train", "test"]]
    for entry in report["probes"]:
        sizes = [percent(entry["majority"]), str(entry["train"]), str(entry["test"])]
        for probe in ("linear", "knn"):
            lines.append([entry["view"], probe, *(percent(entry[probe][kind]) for kind in KINDS), *sizes])
    return lines


def console_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables for a console of 80 columns, so without sizes; the second only where there are probes."""
    pairs = [[f"{line[0]} → {line[1]}", *line[2:7], line[8]] for line in retrieval_cells(report)]
    tables = [console_table(f"Retrieval on {report['samples']} held-out samples, percent", pairs, 1)]
    if report["probes"]:
        probes = [line[:6] for line in probe_cells(report)]
        tables.append(console_table("Probes on the features before the head, accuracy in percent", probes, 2))
    return tables


def console_table(title: str, lines: Sequence[Sequence[str]], names: int) -> Table:
    """One table; its first `names` columns are text, the others numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(lines[0]):
        table.add_column(heading, justify="left" if index < names else "right", no_wrap=index < names)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def markdown(name: str, report: Mapping[str, Any]) -> str:
    """The report of the export called `name` as a page with GitHub tables."""
    parts = [f"# {name}", RETRIEVAL.format(samples=report["samples"]), markdown_table(retrieval_cells(report), 2)]
    if report["probes"]:
        parts += [PROBES, markdown_table(probe_cells(report), 2)]
    if report["samples_per_second"]:
        parts.append(f"Training ran at {report['samples_per_second']:.0f} samples a second (median over the log).")
    return "\n\n".join([*parts, "![report](report.png)\n"])


def markdown_table(lines: Sequence[Sequence[str]], names: int) -> str:
    """One table; its first `names` columns are text, the others numbers."""
    rule = ["---" if index < names else "---:" for index in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])

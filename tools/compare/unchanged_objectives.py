"""`unchanged`, the objectives: every kind, by the same probe, on both sides and on one, two and three gloo ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tools.compare.runs import Group, grouped
from tools.compare.unchanged_settings import SETTINGS, cases
from tools.compare.unchanged_sides import Job, Side, python, run

PROBE = Path(__file__).with_name("unchanged_probe.py")
RANKS = (1, 2, 3)


def objectives(both: Sequence[Side], kinds: Sequence[str], thorough: bool) -> Iterator[Group]:
    """One group for each kind of objective, and one of the kinds that a side knows and nobody tries."""
    for ranks in RANKS:
        run([job for side in both for job in jobs(side, kinds, ranks, thorough)])
    for side in both:
        refuse_other_package(side)
    tables = [results(side) for side in both]
    for kind in kinds:
        then, now = ({k: v for k, v in table.items() if k.startswith(f"{kind} ")} for table in tables)
        yield grouped(f"objective {kind}", then, now)
    if set(kinds) == set(SETTINGS):
        known = [dict.fromkeys(summary(side)["kinds"], 0.0) for side in both]
        untried = {k for names in known for k in names if k not in SETTINGS}
        group = grouped("kinds of objective", *known)
        yield group._replace(lonely=group.lonely | {f"{k} (add it to unchanged_settings.py)" for k in untried})


def jobs(side: Side, kinds: Sequence[str], ranks: int, thorough: bool) -> Iterator[Job]:
    out = side.folder / f"objectives-{ranks}"
    out.mkdir()
    (out / "cases.json").write_text(json.dumps(cases(kinds, ranks, thorough)))
    command = python("-P", str(PROBE), str(out / "cases.json"), str(out), str(out / "store"))
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        yield Job(f"objectives on {ranks} rank(s)", side, command, out, place)


def results(side: Side) -> dict[str, Tensor]:
    """Everything that the side's probes saw, by case, rank and name."""
    found = {}
    for ranks in RANKS:
        for rank in range(ranks):
            table = load_file(side.folder / f"objectives-{ranks}/rank-{rank}.safetensors")
            for name, value in table.items():
                case, _, thing = name.partition("/")
                found[f"{case}, rank {rank}: {thing}"] = value
    return found


def summary(side: Side, ranks: int = 1, rank: int = 0) -> dict[str, list[str]]:
    return json.loads((side.folder / f"objectives-{ranks}/rank-{rank}.json").read_text())


def refuse_other_package(side: Side) -> None:
    """RuntimeError where a probe has imported files of the package from elsewhere than its side."""
    package = (side.tree / "mvpretrain").resolve()
    for ranks in RANKS:
        for rank in range(ranks):
            for path in summary(side, ranks, rank)["files"]:
                if not Path(path).is_relative_to(package):
                    raise RuntimeError(f"the side {side.name} imported {path}, which is not in {package}")

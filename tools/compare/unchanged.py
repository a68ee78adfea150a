"""Whether this tree computes what an earlier state of it did, to the last bit.

    python -m tools.compare.unchanged [REF] [--only objectives|runs] [--kinds a,b] [--thorough] [--keep FOLDER]

Checks REF out beside the tree (git worktree, removed afterwards), runs the same things in both on this machine's CPU,
and prints what was compared. Objectives: every kind under all of its settings on fixed tables, float32 and float64, one
to three gloo ranks; value, parts, gradients of all rows and parameters, and state over three steps. Runs: twelve steps
by `mvpretrain train` under one process, DDP and ZeRO-2, with a teacher and a queue, with temperatures by sample in
micro-batches, and on views of every kind; resumed half-way, exported and embedded (see runs.py for what of a run is
compared). About 8 minutes on two cores. Exit code 0 where everything is equal, 1 where something is not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.compare.runs import Group
from tools.compare.unchanged_objectives import objectives
from tools.compare.unchanged_runs import runs
from tools.compare.unchanged_settings import SETTINGS
from tools.compare.unchanged_sides import ROOT, git, sides

BEFORE = "3e1d246"  # the last state before the package's files moved
SHOWN = 4  # differences that are named of each thing
ADDED = ("meta.json: format",)  # what later states write besides, which is no change of what a run computes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?", default=BEFORE, help=f"the state to compare with ({BEFORE})")
    parser.add_argument("--only", choices=("objectives", "runs"), help="this part alone")
    parser.add_argument("--kinds", default=",".join(SETTINGS), help="objectives to try, by comma (all)")
    parser.add_argument("--thorough", action="store_true", help="every number of views on every number of ranks")
    parser.add_argument("--keep", type=Path, help="a new folder for everything that both sides wrote")
    mfeat = ROOT.parent / "shared/data/mfeat"
    parser.add_argument("--data", type=Path, default=mfeat, help=f"folder of the Multiple Features tables ({mfeat})")
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in SETTINGS]:
        parser.error(f"no settings for {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    if args.keep and args.keep.exists():
        parser.error(f"{args.keep} exists; give another folder, or remove it first")
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the other tree and its processes go as well
    try:
        with results_folder(args.keep) as folder, sides(args.ref, folder) as both:
            print(f"then: {git('log', '-1', '--format=%h %s', args.ref)}\nnow:  {ROOT}\n", flush=True)
            good = True
            if args.only != "runs":
                good &= table(objectives(both, kinds, args.thorough))
            if args.only != "objectives":
                good &= table(runs(both, args.data, folder))
    except (ValueError, RuntimeError, FileNotFoundError, LookupError) as error:
        print(f"not compared: {error}")
        return 1
    print(f"\n{'all equal' if good else 'NOT EQUAL'}, {time.monotonic() - begin:.0f} s")
    return 0 if good else 1


@contextmanager
def results_folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or one for the time being."""
    if keep:
        keep.mkdir(parents=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="unchanged-") as folder:
            yield Path(folder)


def table(groups: Iterable[Group]) -> bool:
    """Print one line a group as it comes, and the first differences; whether there is none."""
    good = True
    for group in groups:
        added = {name for name in group.lonely if name.endswith(ADDED)}
        group = group._replace(lonely=group.lonely - added)
        good &= group.equal
        count, far = len(group.differences), group.far(0.0)
        verdict = "equal" if group.equal else f"{len(far)} differ, {len(group.lonely)} on one side only"
        more = f"; {len(added)} added since" if added else ""
        print(f"{group.noun:<96} {count:>7} values  {verdict}{more}", flush=True)
        for name, difference in list(far.items())[:SHOWN]:
            print(f"    {name}: differs by {difference:.3g}")
        for name in sorted(group.lonely)[:SHOWN]:
            print(f"    {name}: on one side only")
    return good


if __name__ == "__main__":
    raise SystemExit(main())

"""Objectives for k views side by side on real data: equal towers, batches, steps and optimiser; a table and a plot.

    python -m tools.compare.objectives --out runs/objectives                    # every data set and objective, 3 seeds
    python -m tools.compare.objectives --out runs/objectives --jobs 2           # two runs at once, one core each
    python -m tools.compare.objectives --out OTHER --data mfeat --objectives m3g infonce --seeds 1 --steps 20

Writes OUT/comparison.{md,json,png}. A run is a process of its own and leaves OUT/results/NAME.json when it is finished;
started again, the command goes on with those that are missing, also with more seeds or objectives. SOURCES holds the
folders mfeat, mnist, fsdd and cifar10_jpg, as tools/data/*.py read them; a data set that is not there is left out.

Scores are on held-out data. Linear probes read the encoders' features before the head, from 10 and 50 labelled samples
a class (mean of three draws) and from all; with several encoders, the mean over views. Retrieval is R@1 in the shared
space: over all ordered pairs of views; and of each view from all of the others, fused as their normalised mean or as
their product coordinate by coordinate. `untrained` is the same towers as they start.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.compare import experiment
from tools.compare.objectives_report import write
from tools.compare.objectives_run import DATA, OBJECTIVES, measure

EXPERIMENT = experiment.Experiment("tools.compare.objectives", DATA, OBJECTIVES, measure, write)


def main(argv: Sequence[str] | None = None) -> int:
    return experiment.main(EXPERIMENT, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())

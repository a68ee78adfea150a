"""Fixed against learned temperatures on long-tailed real data: equal towers, batches, steps; tables and plots.

    python -m tools.compare.tailed --out runs/tailed                            # everything, 3 seeds
    python -m tools.compare.tailed --out runs/tailed --jobs 2                   # two runs at once, one core each
    python -m tools.compare.tailed --out OTHER --data eurosat --objectives infonce untrained --seeds 1

Writes OUT/comparison.{md,json,png}, OUT/temperatures.png and OUT/augmentations.png, each of what there are results of.
A run is a process of its own and leaves OUT/results/NAME.json when it is finished; started again, the command goes on
with those that are missing. SOURCES holds mnist, fsdd, cifar10_jpg and eurosat_2k5, as tools/data/*.py read them.

Training sees a long tail of the classes (tools/data/long_tail.py); labels are balanced, for probes and tests
alike. Accuracy is given of all classes, and of the most frequent, the middle and the rarest third each. The data sets
cifar10-1 to cifar10-5 are one axis more: so many augmentations, one added after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.compare import experiment
from tools.compare.tailed_report import write
from tools.compare.tailed_run import AXIS, DATA, OBJECTIVES, measure

EXPERIMENT = experiment.Experiment("tools.compare.tailed", DATA | AXIS, OBJECTIVES, measure, write)


def main(argv: Sequence[str] | None = None) -> int:
    return experiment.main(EXPERIMENT, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())

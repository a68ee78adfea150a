"""The multi-similarity loss against the loop."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch

from mvpretrain.testing.tables import table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    build,
    orthonormal,
)

LABELS = torch.tensor([0, 1, 2, -1, 1, 0, 2, -1, 0, 1, 2, -1])


def classes(whole: Embeddings, labels: bool) -> list[Any]:
    known = {i: y for i, y in zip(whole.ids.tolist(), whole.labels.tolist(), strict=True) if y >= 0}
    return [known.get(i, ("id", i)) if labels else i for i in whole.ids.tolist()]


def loop(whole: Embeddings, pairs: list[tuple[str, str]], labels: bool, margin: float | None) -> float:
    kinds, values = classes(whole, labels), []
    for u, v in pairs:
        for a, c in ((u, v), (v, u)):
            anchors = [i for i in range(12) if whole.present[a][i]]
            total = 0.0
            for i in anchors:
                s = {j: float(whole.z[a][i] @ whole.z[c][j]) for j in range(12) if whole.present[c][j]}
                positives = [x for j, x in s.items() if kinds[j] == kinds[i]]
                negatives = [x for j, x in s.items() if kinds[j] != kinds[i]]
                if margin is not None and positives and negatives:
                    hard = [x for x in negatives if x + margin > min(positives)]
                    positives = [x for x in positives if x - margin < max(negatives)]
                    negatives = hard
                total += math.log(1 + sum(math.exp(-2 * (x - 0.5)) for x in positives)) / 2
                total += math.log(1 + sum(math.exp(40 * (x - 0.5)) for x in negatives)) / 40
            values.append(total / len(anchors))
    return sum(values) / len(values)


@pytest.mark.parametrize("margin", [None, 0.1, 0.8])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_value_is_that_of_the_loop(k, labels, margin):
    whole = table(k, dtype=torch.float64)._replace(labels=LABELS)
    found = build({"kind": "multi_similarity", "labels": labels, "margin": margin}, k)(whole, whole)
    wanted = loop(whole, list(combinations(whole.z, 2)), labels, margin)
    assert float(found.total) == pytest.approx(wanted, rel=1e-10)


def test_mining_leaves_out_what_is_easy():
    whole = orthonormal(2)
    mined, plain = (build({"kind": "multi_similarity", "margin": m}, 2)(whole, whole).total for m in (0.1, None))
    assert mined.item() == 0 < plain.item()  # every positive is at 1, every negative at 0


def test_a_view_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"unknown view in objective\.pairs 'text'"):
        build({"kind": "multi_similarity", "pairs": [["view0", "text"]]}, 2)

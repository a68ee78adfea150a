"""The global contrastive losses with moving averages, as slow as they are written: a loop over anchors, in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvpretrain.testing.tables import table
from mvpretrain.types import Embeddings


class Outcome(NamedTuple):
    value: float
    to_rows: Tensor  # a scalar with the gradient of the objective in the rows
    to_tau: float  # d value / d tau where there is one for all, constant terms included
    to_own: dict[tuple[int, int], float]  # (id, slot) -> the mean gradient of its anchors in their own temperature


class Slow:
    """u by (id, slot): the slot is a direction, or a pair where negatives come from both views."""

    def __init__(self, k: int, gamma: float, eps: float = 1e-14, in_view: bool = False, doubled: bool = False):
        self.pairs = list(combinations([f"view{v}" for v in range(k)], 2))
        self.gamma, self.eps, self.in_view, self.doubled = gamma, eps, in_view, doubled
        self.u: dict[tuple[int, int], float] = {}

    def step(
        self,
        whole: Embeddings,
        tau: Callable[[int, int], float],
        rho: float = 0.0,
        scaled: bool = True,
        with_positive: bool = False,
    ) -> Outcome:
        h, g = {}, {}
        ways = [(a, c) for u, v in self.pairs for a, c in ((u, v), (v, u))]
        for w, (a, c) in enumerate(ways):
            slot = w // 2 if self.in_view else w
            for i, name in enumerate(whole.ids.tolist()):
                differences = self.differences(whole, a, c, i)
                if differences:
                    h[w, i] = (slot, name, differences)
                    each = [math.exp(x.item() / tau(name, slot)) for x in differences]
                    g[w, i] = (sum(each) + with_positive) / len(each)
        members = defaultdict(list)
        for at, (slot, name, _) in h.items():
            members[name, slot].append(g[at])
        for key, values in members.items():
            fresh = sum(values) / len(values) * (2 if self.doubled else 1)
            old = self.u.get(key)
            self.u[key] = fresh if old is None else (1 - self.gamma) * old + self.gamma * fresh
        return self.summed(len(ways), h, tau, rho, scaled)

    def differences(self, whole: Embeddings, a: str, c: str, i: int) -> list[Tensor]:
        """h_ij of an anchor's negatives; empty where it is none."""
        if not whole.present[a][i]:
            return []
        others = range(len(whole.ids))
        positives = [j for j in others if whole.ids[j] == whole.ids[i] and whole.present[c][j]]
        views = (c, a) if self.in_view else (c,)
        negatives = [(j, v) for v in views for j in others if whole.ids[j] != whole.ids[i] and whole.present[v][j]]
        if not positives:
            return []
        own = torch.stack([whole.z[a][i] @ whole.z[c][j] for j in positives]).mean()
        return [whole.z[a][i] @ whole.z[v][j] - own for j, v in negatives]

    def summed(
        self, ways: int, h: dict[Any, Any], tau: Callable[[int, int], float], rho: float, scaled: bool
    ) -> Outcome:
        value, to_tau, to_own = 0.0, 0.0, defaultdict(list)
        to_rows = torch.zeros((), dtype=torch.float64)
        for w in range(ways):
            anchors = [at for at in h if at[0] == w]
            alike = [at for at in h if (at[0] // 2 == w // 2 if self.in_view else at[0] == w)]
            for at in anchors:
                slot, name, differences = h[at]
                t, below = tau(name, slot), self.eps + self.u[name, slot]
                weights = [math.exp(x.item() / t) / below / len(differences) for x in differences]
                inner = sum(p * x.item() / t for p, x in zip(weights, differences, strict=True))
                share, factor = (2 if self.in_view else 1) / len(alike) / len(self.pairs), (t if scaled else 1.0)
                value += share * factor * (math.log(below) + rho)
                to_tau += share * (math.log(below) + rho - inner if scaled else -inner / t)
                # As the papers have it: the mean of e^(h / tau) / (eps + u) dh, the factor tau gone with 1 / tau.
                weighted_by = sum(p * x for p, x in zip(weights, differences, strict=True))
                to_rows = to_rows + share * factor / t * weighted_by
                to_own[name, slot].append(math.log(below) + rho - inner)
        return Outcome(value, to_rows, to_tau, {key: sum(x) / len(x) for key, x in to_own.items()})


def batches(k: int, steps: int) -> list[Embeddings]:
    """Tables whose ids come back, some of them late, with absent views and ids that repeat."""
    found = []
    for step in range(steps):
        whole = table(k, seed=step, dtype=torch.float64)
        ids = whole.ids - 2**60  # 0 to 11
        ids = torch.where((ids > 8) & (step < 2), ids + 100, ids)  # those from 9 on are new in the third batch
        z = {v: x.clone().requires_grad_() for v, x in whole.z.items()}
        found.append(whole._replace(ids=ids, z=z))
    return found


def assert_gradients(whole: Embeddings, wanted: Tensor, total: Tensor) -> None:
    rows = list(whole.z.values())
    found = torch.autograd.grad(total, rows, retain_graph=True)
    slow = torch.autograd.grad(wanted, rows)
    for one, other in zip(found, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

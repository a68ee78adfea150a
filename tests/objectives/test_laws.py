"""A sound objective of a user's own passes every law, and a wrong one is caught by the law that its fault breaks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvpretrain.objectives import any_rows
from mvpretrain.testing import check_objective
from mvpretrain.types import Embeddings, Losses


class Distance(nn.Module):
    """The mean of 1 - cosine over pairs of rows of one id, times a scale to learn; with a fault where one is named."""

    def __init__(self, views: list[str], fault: str = ""):
        super().__init__()
        self.views, self.fault, self.calls = views, fault, 0
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("rows", torch.zeros(1))

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}]

    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        compute = Distance.compute if self.fault == "absent rows" else any_rows(Distance.compute)
        return compute(self, local, gathered)

    def compute(self, local: Embeddings, gathered: Embeddings) -> Losses:
        pairs = [self.pair(local, gathered, u, v) for u, v in combinations(self.views, 2)]
        total = torch.stack(pairs).mean() * self.log_scale.clamp(-3, 3).exp()[0]
        if self.training:
            self.calls += 1
            self.rows += len(local.ids) * (self.fault == "local state")
        total = total + (self.calls if self.fault == "unsaved state" else 0)
        total = total.float() if self.fault == "always float32" else total
        return Losses(total[None] if self.fault == "no scalar" else total, {"loss": total.detach()})

    def pair(self, local: Embeddings, gathered: Embeddings, u: str, v: str) -> Tensor:
        same, everywhere = self.same(local, gathered, u, v), self.same(gathered, gathered, u, v)
        if self.fault == "missing sum":
            everywhere = same
        distances = 1 - local.z[u] @ gathered.z[v].T
        if self.fault == "unguarded root":
            distances = distances.sqrt()
        if self.fault == "wrong gradient":
            distances = distances.detach() / 2 + distances / 2
        if self.fault == "order":
            distances = distances * torch.arange(len(distances))[:, None]
        parts = 1 if self.fault in ("missing sum", "missing factor") else len(gathered.ids) / len(local.ids)
        return torch.where(same, distances, 0).sum() * parts / everywhere.sum().clamp_min(1)

    def same(self, rows: Embeddings, columns: Embeddings, u: str, v: str) -> Tensor:
        one, other = rows.ids[:, None], columns.ids
        if self.fault == "float ids":
            one, other = one.float(), other.float()
        there = columns.present[v] if self.fault == "absent rows" else rows.present[u][:, None] & columns.present[v]
        return (one == other + (self.fault == "next id")) & there


def config(fault: str = "") -> dict[str, Any]:
    return {"kind": f"{__name__}:Distance", "fault": fault}


def test_a_sound_objective_passes(ranks):
    check_objective(Distance, ranks(2))


@pytest.mark.parametrize(("fault", "law", "words"), [
    ("no scalar", "scalars", r"total is \(1,\) torch.float32, not \(\)"),
    ("next id", "matching", "matching views are worth .*, mismatched ones"),
    ("order", "permutation", "the value of shuffled samples is .* instead of"),
    ("absent rows", "absence", "the value with other absent rows is .* instead of"),
    ("float ids", "ids", "the value with other ids for the same samples is .* instead of"),
    ("unguarded root", "extremes", "the gradient of view. with all .* identical is not finite"),
    ("always float32", "dtypes", "total is .* torch.float32, not .* torch.float64"),
    ("wrong gradient", "differences", "the gradient of view0 is .* in which the value rises by"),
    ("unsaved state", "state", "a batch worth 2.* is worth 1.* after saving and loading"),
])  # fmt: skip
def test_a_fault_is_caught_by_its_law(fault, law, words):
    with pytest.raises(AssertionError, match=rf"Distance {{'fault': '{fault}'}}.* breaks the law of {law}: {words}"):
        check_objective(config(fault))


@pytest.mark.parametrize(("fault", "words"), [
    ("missing sum", "the mean value over ranks in step 0 is .* instead of"),
    ("missing factor", "the mean value over ranks in step 0 is .* instead of"),
    ("local state", "the state rows after all steps is .* instead of"),
])  # fmt: skip
def test_a_fault_that_only_ranks_show_is_caught_on_ranks(ranks, fault, words):
    check_objective(config(fault))
    with pytest.raises(AssertionError, match=f"on 2 ranks breaks the law of slices: {words}"):
        check_objective(config(fault), ranks(2))


SOURCE = """
from mvpretrain.objectives import any_rows
from mvpretrain.types import Losses


class MyObjective:
    def __init__(self, power=1):
        self.power = power

    @staticmethod
    def examples():
        return [{}, {"power": 2}]

    @staticmethod
    def takes(k):
        return k == 2

    @any_rows
    def __call__(self, local, gathered):
        (u, a), (v, b) = local.z.items()
        there = local.present[u] & local.present[v]
        everywhere = (gathered.present[u] & gathered.present[v]).sum().clamp_min(1)
        share = there / everywhere * len(gathered.ids) / len(local.ids)
        total = ((a - b).square().sum(dim=1).float() ** self.power * share).sum()
        return Losses(total.to(a.dtype), {})


class Silent(MyObjective):
    examples = None
"""


def test_a_users_class_is_checked_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "losses_of_a_user.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=r"^losses_of_a_user:MyObjective of 2 views breaks the law of differences"):
        check_objective("losses_of_a_user:MyObjective", ranks=2)  # for its float()
    (tmp_path / "losses_that_are_right.py").write_text(SOURCE.replace(".float()", ""))
    check_objective("losses_that_are_right:MyObjective", ranks=2)
    check_objective({"kind": "losses_that_are_right:MyObjective", "power": 2})


def test_a_class_without_examples_is_refused(tmp_path, monkeypatch):
    (tmp_path / "losses_without.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"'losses_without:Silent' has no examples to check: give Silent a classmethod"
    ):
        check_objective("losses_without:Silent")

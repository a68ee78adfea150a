"""The matching gap against a dense one from its definition, finite differences and its special cases."""

from __future__ import annotations

import math
import weakref
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvpretrain import objectives
from mvpretrain.distributed.collectives import ProcessGroup
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.objectives.m3g import M3G
from mvpretrain.testing._slices import check_slices, mean
from mvpretrain.testing.tables import ROWS, draw, leaves, names, part_of, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import assert_gradient_is_that_of_finite_differences

EXACT = {"tolerance": 1e-13, "max_steps": 200}


def m3g(config: dict[str, Any], k: int) -> M3G:
    objective = objectives.build({"kind": "m3g", **config}, names(k))
    assert isinstance(objective, M3G)
    return objective


class Dense(NamedTuple):
    value: Tensor
    gradients: list[Tensor]
    accuracy: float


def true_matching(whole: Embeddings) -> Tensor:
    """J, tuple by tuple: the mass of an id times, for each view, the id's share that lies on the row."""
    n, views = len(whole.ids), list(whole.z)
    found = torch.zeros([n] * len(views), dtype=torch.float64)
    for i in whole.ids.unique().tolist():
        rows, spread = (whole.ids == i).nonzero().flatten().tolist(), []
        for v in views:
            gaps = (~whole.present[v]).nonzero().flatten().tolist()
            on = {r: 1 / len(rows) for r in rows if whole.present[v][r]}
            lost = 1 - sum(on.values())
            spread.append(on | ({r: lost / len(gaps) for r in gaps} if len(on) < len(rows) else {}))
        for at in product(*spread):
            found[at] += len(rows) / n * math.prod(s[r] for s, r in zip(spread, at))
    return found


def dense(whole: Embeddings, epsilon: float) -> Dense:
    """The definition with all n^k tuples, Sinkhorn in logarithms on the whole tensor."""
    live = torch.stack(list(whole.present.values())).any(dim=0)
    whole = leaves(whole.rows(live))
    n, views = len(whole.ids), list(whole.z)
    k = len(views)
    cost = torch.zeros([n] * k, dtype=torch.float64)
    for u, v in combinations(range(k), 2):
        both = torch.outer(whole.present[views[u]], whole.present[views[v]]).double()
        pair = (1 - both * (whole.z[views[u]] @ whole.z[views[v]].T)) * 2 / k**2
        cost = cost + pair.reshape([n if axis in (u, v) else 1 for axis in range(k)])
    plan = sinkhorn(cost.detach(), epsilon)
    true = true_matching(whole)
    for axis in range(k):
        rest = [a for a in range(k) if a != axis]
        torch.testing.assert_close(true.sum(rest), torch.full((n,), 1 / n, dtype=torch.float64))
    entropies = torch.xlogy(true, true).sum() - torch.xlogy(plan, plan).sum()
    value = ((true - plan) * cost).sum()
    gradients = torch.autograd.grad(value, list(whole.z.values()), allow_unused=True)
    full = [torch.zeros(len(live), z.shape[1], dtype=torch.float64) for z in whole.z.values()]
    for whole_gradient, g in zip(full, gradients):
        whole_gradient[live] = g
    return Dense((value + epsilon * entropies).detach(), full, accuracy(plan, whole))


def sinkhorn(cost: Tensor, epsilon: float) -> Tensor:
    k, n = cost.ndim, len(cost)
    log = -cost / epsilon
    for _ in range(20_000):
        missed = 0.0
        for axis in range(k):
            mass = log.logsumexp([a for a in range(k) if a != axis], keepdim=True)
            missed += float((mass.exp() - 1 / n).abs().sum())
            log = log - mass - math.log(n)
        if missed < 1e-13:
            break
    return log.exp()


def accuracy(plan: Tensor, whole: Embeddings) -> float:
    views, right = list(whole.z), []
    for i in (whole.present[views[0]]).nonzero().flatten().tolist():
        hits = []
        for axis, v in enumerate(views[1:], 1):
            rest = [a for a in range(plan.ndim) if a not in (0, axis)]
            masses = (plan.sum(rest) if rest else plan)[i].masked_fill(~whole.present[v], -1)
            if (whole.ids[whole.present[v]] == whole.ids[i]).any():
                hits.append(bool(whole.ids[masses.argmax()] == whole.ids[i]))
        right += [all(hits)] if hits else []
    return sum(right) / max(len(right), 1)


def smaller(k: int, plain: bool, seed: int = 3) -> Embeddings:
    """As few rows as k axes allow, with equal ids and every kind of missing views left in."""
    rows = slice(0, {2: 12, 3: 12, 4: 9, 5: 8, 6: 5}[k])
    whole = table(k, seed=seed, dtype=torch.float64, plain=plain).rows(rows)
    if not plain:
        whole.ids[1] = whole.ids[2] = whole.ids[4]
        whole.present[names(k)[1]][[1, 3]] = False
        whole.present.update({v: p.index_fill(0, torch.tensor(0), False) for v, p in whole.present.items()})
    return whole


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("epsilon", [0.03, 0.2])
def test_is_the_dense_gap(epsilon, k, plain):
    whole = leaves(smaller(k, plain))
    losses = m3g({"epsilon": epsilon, **EXACT}, k)(whole, whole)
    losses.total.backward()
    wanted = dense(whole, epsilon)
    torch.testing.assert_close(losses.total.detach(), wanted.value, rtol=1e-10, atol=1e-12)
    for z, gradient in zip(whole.z.values(), wanted.gradients):
        torch.testing.assert_close(z.grad, gradient, rtol=1e-8, atol=1e-10)
    parts = {name: float(x) for name, x in losses.parts.items()}
    assert parts["gap"] == float(losses.total.detach()) and parts["gradient_error"] < 1e-6
    assert parts["accuracy"] == pytest.approx(wanted.accuracy)
    assert parts["temperature"] == pytest.approx(k**2 * epsilon / 2)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_float32_is_right_to_four_digits(k):
    for epsilon in (0.05, 0.2):
        whole = leaves(smaller(k, plain=False))
        single = leaves(whole._replace(z={v: z.detach().float() for v, z in whole.z.items()}))
        found = m3g({"epsilon": epsilon, "tolerance": 1e-6}, k)(single, single).total
        found.backward()
        wanted = dense(whole, epsilon)
        assert float(found.detach()) == pytest.approx(float(wanted.value), rel=1e-4)
        for z, gradient in zip(single.z.values(), wanted.gradients):
            assert z.grad is not None and (z.grad - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_gradient_is_that_of_finite_differences(k):
    assert_gradient_is_that_of_finite_differences(m3g(EXACT, k), k)


def matched(k: int, n: int = ROWS) -> Embeddings:
    """Every view of a row is the same, rows are orthogonal."""
    rows = torch.linalg.qr(draw(3, n, n))[0]
    whole = table(k, plain=True, dtype=torch.float64).rows(slice(0, n))
    return whole._replace(z=dict.fromkeys(names(k), rows))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_is_zero_at_a_perfect_matching(k):
    whole = matched(k)
    assert float(m3g({"epsilon": 0.01}, k)(whole, whole).total) == pytest.approx(0, abs=1e-7)
    assert float(m3g({"epsilon": 0.01}, k)(whole, whole).parts["accuracy"]) == 1
    # The same sample twice, and a view missing here and there, do not lift the floor.
    twice = whole.rows(torch.arange(ROWS).repeat(2)[3:])
    assert float(m3g({"epsilon": 0.01}, k)(twice, twice).total) == pytest.approx(0, abs=1e-7)
    if k > 2:
        for i, v in enumerate(names(k)):
            whole.present[v][[i, i + 1]] = False
        assert 0 <= float(m3g({"epsilon": 0.005}, k)(whole, whole).total) < 0.01


@pytest.mark.parametrize("max_steps", [0, 50])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_is_never_negative(k, max_steps):
    for seed in range(5):
        whole = table(k, seed=seed, dtype=torch.float64)
        assert m3g({"max_steps": max_steps, "epsilon": 0.02}, k)(whole, whole).total > 0


def test_two_views_without_competition_for_columns_are_infonce():
    # On a batch that a rotation maps to itself, the plan of rows is that of columns: InfoNCE's softmax has both.
    n, epsilon = 8, 0.1
    angles = torch.arange(n, dtype=torch.float64) * 2 * torch.pi / n
    x, y = (torch.stack([(angles + shift).cos(), (angles + shift).sin()], dim=1) for shift in (0.0, 0.3))
    whole = table(2, plain=True, dtype=torch.float64).rows(slice(0, n))._replace(z={"view0": x, "view1": y})
    infonce = cross_entropy(x @ y.T / (2 * epsilon), torch.arange(n))
    torch.testing.assert_close(m3g({"epsilon": epsilon}, 2)(whole, whole).total / epsilon, infonce)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_temperature_means_the_same_for_any_number_of_views(k):
    # A view that nobody has leaves the gap of the others, in units of epsilon.
    whole, tau = table(k, plain=True, dtype=torch.float64), 0.3
    z = whole.z | {f"view{k}": normalize(draw(9, ROWS, 8), dim=1)}
    more = whole._replace(z=z, present=whole.present | {f"view{k}": torch.zeros(ROWS, dtype=torch.bool)})
    few, many = (m3g({"temperature": tau, **EXACT}, views) for views in (k, k + 1))
    assert few.epsilon == pytest.approx(2 * tau / k**2)
    torch.testing.assert_close(many(more, more).total / many.epsilon, few(whole, whole).total / few.epsilon)
    assert float(few(whole, whole).parts["temperature"]) == pytest.approx(tau)


def test_epsilon_is_two_tenths_where_none_is_given():
    assert m3g({}, 3).epsilon == 0.2
    assert m3g({"epsilon": 0.7}, 3).epsilon == 0.7


def test_listed_views_alone_are_matched():
    whole = leaves(table(4, dtype=torch.float64))
    found = m3g({"views": ["view3", "view1"]}, 4)(whole, whole).total
    found.backward()
    two = whole._replace(z={v: whole.z[v] for v in ("view3", "view1")})
    wanted = objectives.build({"kind": "m3g"}, list(two.z))(two, two).total
    assert float(found.detach()) == float(wanted.detach())
    assert whole.z["view0"].grad is None and whole.z["view3"].grad is not None


def test_what_has_not_converged_shows():
    whole = table(3, dtype=torch.float64)
    parts = m3g({"epsilon": 0.005, "max_steps": 1}, 3)(whole, whole).parts
    assert parts["newton_steps"] == 1 and parts["unconverged"] == 1 and parts["gradient_error"] > 0.01
    parts = m3g({"epsilon": 0.005}, 3)(whole, whole).parts
    assert 1 < parts["newton_steps"] < 50 and parts["unconverged"] == 0 and parts["gradient_error"] <= 0.01


def test_ranks_are_one_process_in_logarithms(ranks):
    check_slices(objectives.registry.parse({"kind": "m3g", "epsilon": 0.004, "tolerance": 1e-6}), ranks(2))


def own_rows(rank: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(value, gradients in z), the mean over ranks, where each rank matches its own rows."""
    collectives, mine = ProcessGroup(), leaves(part_of(table(3, dtype=torch.float64), rank, size))
    objective = objectives.build({"kind": "m3g", "scope": "rank"}, names(3), collectives)
    losses = objective(*gather_embeddings(mine, collectives))
    losses.total.backward()
    return mean(losses.total.detach(), collectives), {v: z.grad for v, z in mine.z.items() if z.grad is not None}


@pytest.mark.parametrize("size", [2, 4])
def test_per_rank_is_the_mean_of_each_ranks_gap(ranks, size):
    found, wanted = ranks(size).run(own_rows, size), []
    for rank, (_, gradients) in enumerate(found):
        part = leaves(part_of(table(3, dtype=torch.float64), rank, size))
        losses = m3g({}, 3)(part, part)
        losses.total.backward()
        wanted.append(losses.total.detach())
        for v, z in part.z.items():
            torch.testing.assert_close(gradients[v], z.grad)
    for value, _ in found:
        torch.testing.assert_close(value, torch.stack(wanted).mean(), rtol=1e-12, atol=0)


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("k", "n", "epsilon"), [(2, 512, 0.2), (3, 512, 0.2), (3, 512, 0.02), (4, 96, 0.2), (6, 12, 0.2)]
)
def test_memory_is_what_is_held(k, n, epsilon):
    z = {v: normalize(draw(i, n, 16), dim=1).float().requires_grad_() for i, v in enumerate(names(k))}
    whole = Embeddings(z, torch.arange(n), dict.fromkeys(z, torch.ones(n, dtype=torch.bool)), torch.zeros(n))
    config = {"epsilon": epsilon, "max_steps": 2}
    with Held() as held:
        m3g(config, k)(whole, whole).total.backward()
    claimed = objectives.registry.parse({"kind": "m3g", **config}).memory(k, n, n, 16)
    assert claimed / 2 < held.peak < claimed, (held.peak, claimed)


@pytest.mark.parametrize(("config", "message"), [
    ({"epsilon": 0.2, "temperature": 0.1}, "objective.epsilon=0.2 and objective.temperature=0.1 are given, but one"),
    ({"epsilon": 0}, "greater than 0"),
    ({"views": ["view0", "vieww1"]}, "unknown view in objective.views 'vieww1'; did you mean 'view1'"),
    ({"views": ["view0"]}, "needs two or more different views"),
    ({"views": ["view0", "view0"]}, "needs two or more different views"),
    ({"scope": "node"}, "'global' or 'rank'"),
])  # fmt: skip
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        m3g(config, 3)

"""The multi-marginal matching gap over k views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from mvpretrain.config import unknown
from mvpretrain.distributed.collectives import Collectives, SingleProcess
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.transport import sinkhorn
from mvpretrain.transport.contraction import Tables
from mvpretrain.types import Embeddings, Losses

SHARED = 2**22  # tuples: below, a rank solves the whole plan sooner than it hears from the others


class M3GConfig(ObjectiveConfig):
    """The matching gap; `epsilon` is the paper's, for a cost in [0, 1], or else 2 `temperature` / k^2; 0.2 by default.

    `temperature` compares with InfoNCE's and means the same for any k; epsilon = 0.2 is one of 0.4 for two views, 0.9
    for three and 1.6 for four. `tolerance` bounds the gradient's error, relative to the gradient; `max_steps` of
    Newton's method, after `sweeps` of Sinkhorn's, bound the work on it. `views` are those that are matched. `scope:
    rank` matches each rank's own rows only, as the published runs did.
    """

    kind: Literal["m3g"] = "m3g"
    epsilon: float | None = Field(default=None, gt=0)
    temperature: float | None = Field(default=None, gt=0)
    tolerance: float = Field(default=0.01, gt=0)
    max_steps: int = Field(default=50, ge=0)
    sweeps: int = Field(default=2, ge=0)
    views: Literal["all"] | tuple[str, ...] = "all"
    scope: Literal["global", "rank"] = "global"

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [{}, {"temperature": 0.1}, {"epsilon": 0.05, "tolerance": 1e-5}]

    def differentiable(self) -> bool:
        return False  # it is the derivative at the fixed point, to the tolerance

    @model_validator(mode="after")
    def _one_scale(self) -> M3GConfig:
        if self.epsilon is not None and self.temperature is not None:
            raise ValueError(
                f"objective.epsilon={self.epsilon:g} and objective.temperature={self.temperature:g} are given, but "
                "one determines the other, epsilon = 2 temperature / k^2; keep one"
            )
        return self

    def listed(self, views: Sequence[str]) -> list[str]:
        return list(views) if self.views == "all" else list(self.views)

    def scale(self, k: int) -> float:
        """The epsilon of k views."""
        return 2 * self.temperature / k**2 if self.temperature is not None else self.epsilon or 0.2

    def check(self, views: Sequence[str]) -> None:
        chosen = self.listed(views)
        for v in chosen:
            if v not in views:
                raise ValueError(unknown("view in objective.views", v, views))
        if len(set(chosen)) != len(chosen) or len(chosen) < 2:
            raise ValueError(f"objective.views is {chosen}; the matching gap needs two or more different views")

    def build(self, views: Sequence[str], collectives: Collectives) -> M3G:
        return M3G(self, self.listed(views), SingleProcess() if self.scope == "rank" else collectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        k = views if self.views == "all" else len(self.views)
        n, own = (rows, rows) if self.scope == "rank" else (gathered, rows)
        tables = (k - 1) * own * n + (k - 1) * (k - 2) // 2 * n * n
        # Costs, kernels (both ways round beyond three views), the pairs of this step's plan and of the next one's; six
        # tables of a block and its sums; the Hessian, and one block of it on its way there, in float64.
        block = max(n * n, min(n ** (k - 1), sinkhorn.BLOCK["cuda" if torch.cuda.is_available() else "cpu"]))
        held = (4 + (k > 3)) * tables + 6 * block
        hessian = (own + (k - 1) * n) ** 2 + 2 * n * n
        wide = sinkhorn.MAX_RANGE[torch.float32] * self.scale(k) < 2 * (k - 1) / k
        return (
            super().memory(views, rows, gathered, dim) + held * (8 if wide else 4) + hessian * 8 + 3 * k * n * dim * 4
        )


class PresentRows(NamedTuple):
    """The rows of a table that take part: those with one of the views at least."""

    z: list[Float[Tensor, "n d"]]  # by view; 0 where the view is missing
    present: list[Bool[Tensor, " n"]]
    ids: Int[Tensor, " n"]


class M3G(nn.Module):
    """The multi-marginal matching gap of Piran, Klein, Thornton and Cuturi (ICML 2024), exact on the gathered batch.

    A tuple takes one row of each view and costs the circular variance of its k unit vectors,

        c(z_1 ... z_k) = 1 - |mean_u z_u|^2 = (2 / k^2) sum_{u<v} (1 - <z_u, z_v>),   in [0, 1],

    and the plan P that has uniform marginals and the least <P, c> + epsilon sum P log P is compared with the true
    matching J of samples:

        L = <J, c> + epsilon sum J log J - min_P (<P, c> + epsilon sum P log P)   >= 0.

    This is the tight Fenchel-Young gap: with J = I / n, sum J log J is -log n (the paper prints + epsilon log n, which
    has the same gradient and no zero). It is 0 only where P = J. The gradient is <J - P, dc>, P held fixed (Danskin;
    Prop. 3.2), where only P's marginals on pairs of views are needed. Each pair's similarities are compared at the
    temperature k^2 epsilon / 2. With k = 2 and half a sweep, L / epsilon is the InfoNCE of temperature 2 epsilon.

    Rows of one id are one sample: J matches each of them with all of them evenly, so that L has no floor where they
    come twice. A row's missing view is as similar to anything as orthogonal vectors are, and k stays the number of all
    views: the temperature is the same for every pair, and the gap of k views of which one is nowhere is, over epsilon,
    that of the others. J matches such a row evenly with the gaps of that view. Rows without any view count nowhere.

    Where there are more than 4 million tuples, each rank works on its own n / W of the first view's rows against all
    of the others: on that part of an update's 2 n^k operations. `accuracy` is the part of the samples whose most likely
    partner in every other view, by the plan's marginals on pairs with the first view, is their own; samples without the
    first view, or without another, do not count. `gradient_error` estimates how far the gradient is from that of the
    converged plan, relative to it; `unconverged` is 1 where that is above the tolerance. State: none.
    """

    def __init__(self, config: M3GConfig, views: list[str], collectives: Collectives):
        super().__init__()
        self.config, self.views, self.collectives = config, views, collectives
        self.epsilon = config.scale(len(views))

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        k = len(self.views)
        rows = present_rows(local if self.config.scope == "rank" else gathered, self.views)
        zero = rows.z[0].new_zeros(())
        parts = {"gap": zero, "newton_steps": zero, "gradient_error": zero, "unconverged": zero, "accuracy": zero}
        parts["temperature"] = rows.z[0].new_tensor(k**2 * self.epsilon / 2)
        if not len(rows.ids):
            return Losses(torch.stack([z.sum() for z in rows.z]).sum(), parts)
        plan, gradients, accuracy = self.plan(rows)
        matching = group_by_id(rows)
        gap = true_cost(matching) + self.epsilon * true_entropy(matching) - plan.value
        parts |= {"gap": gap.detach(), "accuracy": accuracy, "gradient_error": plan.distance / plan.scale}
        parts["newton_steps"] = zero + plan.steps
        parts["unconverged"] = zero + (not plan.converged)
        # The plan's value moves as <P, dc> does, and this rank has its rows' part of P alone: ranks are averaged later.
        moved = torch.stack([((z - z.detach()) * g).sum() for z, g in zip(rows.z, gradients)]).sum()
        part = 1 / self.solving(len(rows.ids)).size
        return Losses(gap - moved / part, parts)

    def solving(self, n: int) -> Collectives:
        """The ranks that share the work on a plan of n rows a view: few tuples are faster counted than sent for."""
        return self.collectives if n ** len(self.views) > SHARED else SingleProcess()

    @torch.no_grad()
    def plan(self, rows: PresentRows) -> tuple[sinkhorn.Solution, list[Float[Tensor, "n d"]], Float[Tensor, ""]]:
        """(the plan, this rank's part of d value / d z, accuracy)."""
        n, k = len(rows.ids), len(rows.z)
        collectives = self.solving(n)
        own = slice(collectives.rank * n // collectives.size, (collectives.rank + 1) * n // collectives.size)
        z = [rows.z[0][own], *rows.z[1:]]
        pairs = list(combinations(range(k), 2))
        costs = [(z[u] @ z[v].T).sub_(1).mul_(-2 / k**2) for u, v in pairs]
        solution = sinkhorn.solve(
            costs,
            self.epsilon,
            [x.new_full((len(x),), 1 / n) for x in z],
            self.config.tolerance,
            max_steps=self.config.max_steps,
            updates=self.config.sweeps * k,
            scale=lambda tables: mismatched_mass(rows, own, tables, collectives),
            total=collectives.sum,
            maximum=collectives.maximum,
        )
        gradients = [torch.zeros_like(x) for x in rows.z]
        grad_z = [gradients[0][own], *gradients[1:]]
        for (u, v), table in zip(pairs, solution.pairs):
            grad_z[u].addmm_(table, z[v], alpha=-2 / k**2)
            grad_z[v].addmm_(table.T, z[u], alpha=-2 / k**2)
        counts = torch.stack(count_matched(rows, own, solution.pairs[: k - 1])).to(z[0].dtype)
        matched, counted = collectives.sum(counts)
        return solution, gradients, matched / counted.clamp_min(1)


def present_rows(table: Embeddings, views: Sequence[str]) -> PresentRows:
    """The rows of a table that have one of these views at least, in float32 or float64."""
    live = torch.stack([table.present[v] for v in views]).any(dim=0)
    present = [table.present[v][live] for v in views]
    z = [table.z[v][live].masked_fill(~p[:, None], 0) for v, p in zip(views, present)]
    return PresentRows([x if x.dtype == torch.float64 else x.float() for x in z], present, table.ids[live])


def mismatched_mass(rows: PresentRows, own: slice, plan: Tables, collectives: Collectives) -> Tensor:
    """What is left of |J - P|_1, mean over pairs of views: twice the plan's mass between present rows of other ids.

    As training succeeds it shrinks, and with it the gradient, whose relative error the solver bounds. Where it is lost
    in the rounding of the whole mass, that rounding is returned.
    """
    masses = []
    for (u, v), table in plan.items():
        ids, present = (x[own] if u == 0 else x for x in (rows.ids, rows.present[u]))
        other = (ids[:, None] != rows.ids) & present[:, None] & rows.present[v]
        masses.append((table * other).sum())
    mean = collectives.sum(torch.stack(masses)).sum() * 2 / len(masses)
    return mean.clamp_min(64 * torch.finfo(rows.z[0].dtype).eps)


def count_matched(
    rows: PresentRows, own: slice, pairs: Sequence[Float[Tensor, "b n"]]
) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """Of this rank's rows of the first view: how many have all their most likely partners right, and how many count."""
    ids = rows.ids[own]
    right, any_partner = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for table, present in zip(pairs, rows.present[1:]):
        likeliest = rows.ids[table.masked_fill(~present, -1).argmax(dim=1)]
        has_partner = torch.isin(ids, rows.ids[present])
        right &= (likeliest == ids) | ~has_partner
        any_partner |= has_partner
    counted = any_partner & rows.present[0][own]
    return (right & counted).sum(), counted.sum()


class Matching(NamedTuple):
    """The samples' true matching J: an id has the mass `size` / n, evenly on its rows of each view."""

    sums: Float[Tensor, "k g d"]  # of an id's present rows
    present: Float[Tensor, "k g"]  # how many these are
    size: Float[Tensor, " g"]  # rows of the id


def group_by_id(rows: PresentRows) -> Matching:
    unique, group = rows.ids.unique(return_inverse=True)
    z, present = torch.stack(rows.z), torch.stack(rows.present).to(rows.z[0].dtype)
    sums = z.new_zeros(len(z), len(unique), z.shape[2]).index_add(1, group, z)
    count = present.new_zeros(len(z), len(unique)).index_add(1, group, present)
    return Matching(sums, count, group.bincount(minlength=len(unique)).to(z.dtype))


def true_cost(j: Matching) -> Float[Tensor, ""]:
    """<J, c>: two rows of an id of size m meet in 1 / (n m) of the mass."""
    k = len(j.sums)
    same_id = j.sums.sum(dim=0).square().sum(dim=1) - j.sums.square().sum(dim=(0, 2))
    return (k * (k - 1) - (same_id / j.size).sum() / j.size.sum()) / k**2


def true_entropy(j: Matching) -> Float[Tensor, ""]:
    """sum J log J. Rows that lack a view share all gaps of it evenly, so that J has uniform marginals.

    An id of mass q spreads it, in each view, over its present rows, q / m on each, and over the view's gaps. Tuples of
    different ids are different, but for the one that has a gap in every view.
    """
    mass, gap = j.size / j.size.sum(), 1 - j.present / j.size
    gaps = (j.size - j.present).sum(dim=1, keepdim=True).clamp_min(1)
    by_view = torch.xlogy(gap, gap / gaps) - (1 - gap) * j.size.log()
    empty = mass * gap.prod(dim=0)
    return (mass * (mass.log() + by_view.sum(dim=0)) - torch.xlogy(empty, empty)).sum() + torch.xlogy(
        empty.sum(), empty.sum()
    )

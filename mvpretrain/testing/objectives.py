"""The laws of objectives: what holds for every kind, number of views and number of ranks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvpretrain import objectives
from mvpretrain.distributed import sample_state
from mvpretrain.distributed.pool import Pool
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.testing._building import DIM, build, numbers_of_views, parameters, state_of
from mvpretrain.testing._laws import described, law, require, require_close, require_finite, settings_of
from mvpretrain.testing._slices import check_slices
from mvpretrain.testing.tables import ROWS, draw, labels_of, leaves, names, table
from mvpretrain.types import Embeddings, Losses, Objective

STEP = 1e-6  # of finite differences, in float64
FAR = 20.0  # beyond the bounds of a logarithm of a temperature or scale


def check_objective(
    objective: str | type | Mapping[str, Any] | ObjectiveConfig, ranks: int | Pool | None = None
) -> None:
    """Hold an objective to the laws of objectives: those of one process, and with `ranks` those of several.

    `objective`: settings with a `kind`, or a kind, import path or class, whose examples() are then all checked. Its
    views are called view0, view1, ...; of the numbers of views that it takes, the least three. `ranks`: 2 to 4 gloo
    processes that are started here, or a pool of them that the caller keeps.
    AssertionError: a sentence with the law, the settings and the numbers. ValueError: nothing to check.
    Cost: below a second a setting, and a few seconds for ranks to start.
    """
    pool = Pool(ranks) if isinstance(ranks, int) else ranks
    with pool if pool is not None and isinstance(ranks, int) else nullcontext():
        for config in settings_of(objectives.registry, objective):
            for name, check, views in LAWS:
                for k in views(numbers_of_views(config)):
                    with law(name, f"{described(config)} of {k} views"):
                        check(config, k)
            if pool is not None:
                check_slices(config, pool)


def value(config: ObjectiveConfig, whole: Embeddings) -> Losses:
    """A new objective's losses on one table in one process; its parameters are float64 with the rows, else float32."""
    z = next(iter(whole.z.values()))
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return build(config, len(whole.z), dtype, dim=z.shape[1])(whole, whole)


def row_gradients(total: Tensor, whole: Embeddings) -> dict[str, Tensor]:
    """The gradient of each view's rows; zeros where none arrives."""
    found = torch.autograd.grad(total, list(whole.z.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(whole.z, found))


def check_scalars(config: ObjectiveConfig, k: int) -> None:
    """Scalars of the table's type that reach every view and parameter; parameters as DeepSpeed 0.19.8 takes them."""
    whole, objective = leaves(table(k)), build(config, k, torch.float32)
    losses = objective(whole, whole)
    require_scalars(losses, torch.float32)
    losses.total.backward()
    for name, x in (whole.z | parameters(objective)).items():
        require_finite(x.grad, f"the gradient of {name}")
        require(x.grad is not None and bool(x.grad.abs().sum() > 0), f"the gradient of {name} is 0")
    for name, p in parameters(objective).items():
        require(p.ndim > 0 and p.is_contiguous(), f"the parameter {name} has no dimension or is not contiguous")
    claimed = config.memory(k, ROWS, ROWS, DIM)
    require(claimed > 0, f"its memory is {claimed} bytes")


def require_scalars(losses: Losses, dtype: torch.dtype) -> None:
    total = losses.total
    require(total.shape == () and total.dtype == dtype, f"total is {tuple(total.shape)} {total.dtype}, not () {dtype}")
    require_finite(total, "total")
    for name, x in losses.parts.items():
        require(x.shape == () and not x.requires_grad, f"the part {name!r} is no detached scalar: {x}")
        require_finite(x, f"the part {name!r}")


def check_matching(config: ObjectiveConfig, k: int) -> None:
    """Matching views are worth less than mismatched ones."""
    whole, rows = table(k, plain=True), torch.eye(ROWS)
    right = whole._replace(z=dict.fromkeys(names(k), rows))
    wrong = whole._replace(z={v: rows.roll(i, 0) for i, v in enumerate(names(k))})
    low, high = (float(value(config, x).total.detach()) for x in (right, wrong))
    require(low < high - 1e-3, f"matching views are worth {low:.6g}, mismatched ones {high:.6g}")


def check_permutation(config: ObjectiveConfig, k: int) -> None:
    """The order of samples does not matter, to the value nor to any row's gradient."""
    whole, order = leaves(table(k)), torch.randperm(ROWS, generator=torch.Generator().manual_seed(4))
    shuffled = leaves(whole.rows(order))
    found, wanted = value(config, shuffled).total, value(config, whole).total
    require_close(found, wanted, 1e-5, 1e-6, "the value of shuffled samples")
    gradients = row_gradients(wanted, whole)
    for v, gradient in row_gradients(found, shuffled).items():
        require_close(gradient, gradients[v][order], 1e-3, 1e-4, f"the gradient of {v} in shuffled samples")


def check_absence(config: ObjectiveConfig, k: int) -> None:
    """What the row of an absent view holds does not matter, and it has no gradient; nor do rows without any view."""
    whole, other = leaves(table(k)), table(k, seed=9)
    total = value(config, whole).total
    z = {v: torch.where(p[:, None], whole.z[v].detach(), other.z[v]) for v, p in whole.present.items()}
    require_close(value(config, whole._replace(z=z)).total, total, 1e-6, 1e-6, "the value with other absent rows")
    z = {v: z[v].masked_fill(~p[:, None], torch.nan).requires_grad_() for v, p in whole.present.items()}
    filled = whole._replace(z=z)
    unknown = value(config, filled).total
    require_close(unknown, total, 1e-6, 1e-6, "the value with NaN in absent rows")
    for found, table_ in ((total, whole), (unknown, filled)):
        for v, gradient in row_gradients(found, table_).items():
            require_finite(gradient, f"the gradient of {v}")
            largest = float(gradient[~whole.present[v]].abs().sum())
            require(largest == 0, f"the gradients of absent rows of {v} add to {largest:.6g}")
    longer = value(config, whole.pad(ROWS + 5)).total
    require_close(longer, total, 1e-6, 1e-6, "the value with 5 more rows that are absent in every view")


def check_ids(config: ObjectiveConfig, k: int) -> None:
    """Ids say which rows are of one sample and nothing else; all 64 bits count."""
    whole = table(k, dtype=torch.float64)
    other = whole.ids.unique()
    other = other.new_tensor([(-1) ** i * 2**62 + 37 * i for i in range(len(other))])
    renamed = whole._replace(ids=other[torch.searchsorted(whole.ids.unique(), whole.ids)])
    one, two = value(config, renamed).total, value(config, whole).total
    require_close(one, two, 1e-9, 1e-9, "the value with other ids for the same samples")
    require_finite(one, "the value")


def extremes(k: int) -> dict[str, Embeddings]:
    """Tables at which a root, a logarithm or a quotient could give no number."""
    whole, nobody = table(k), torch.zeros(ROWS, dtype=torch.bool)
    first = whole.z[names(k)[0]]
    return {
        "all rows identical": whole._replace(z={v: z[:1].expand(ROWS, -1) for v, z in whole.z.items()}),
        "all views identical": whole._replace(z=dict.fromkeys(names(k), first)),
        "views antipodal": whole._replace(z={v: first * (-1) ** i for i, v in enumerate(names(k))}),
        "one id": whole._replace(ids=torch.full((ROWS,), -5)),
        "one label": whole._replace(labels=torch.zeros_like(whole.labels)),
        "a view missing": whole._replace(present=whole.present | {names(k)[-1]: nobody}),
        "all views missing": whole._replace(present=dict.fromkeys(names(k), nobody)),
        "one row": whole.rows(slice(1, 2)),
    }


def check_extremes(config: ObjectiveConfig, k: int) -> None:
    """Value, parts and gradients are finite numbers, also with every parameter far beyond its bounds."""
    for problem, whole in extremes(k).items():
        require_finite_results(build(config, k, torch.float32), leaves(whole), f"with {problem}")
    for far in (-FAR, FAR):
        objective = build(config, k, torch.float32)
        moved = {n: p for n, p in parameters(objective).items() if p.ndim == 1 and n.rpartition(".")[2][:4] == "log_"}
        for p in moved.values():
            nn.init.constant_(p, far)
        if moved:
            require_finite_results(objective, leaves(table(k)), f"with {', '.join(moved)} at {far:g}")


def require_finite_results(objective: Objective, whole: Embeddings, when: str) -> None:
    losses = objective(whole, whole)
    for name, x in ({"total": losses.total} | losses.parts).items():
        require_finite(x, f"{name} {when}")
    for v, gradient in row_gradients(losses.total, whole).items():
        require_finite(gradient, f"the gradient of {v} {when}")


def check_dtypes(config: ObjectiveConfig, k: int) -> None:
    """float64 is computed in float64, float32 comes near it; half precision and autocast do not reach the objective."""
    whole = table(k, dtype=torch.float64)
    wanted = value(config, whole)
    require_scalars(wanted, torch.float64)
    found = value(config, cast(whole, torch.float32)).total
    require_close(found, wanted.total, 1e-3, 1e-4, "the value in float32, against float64,")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = cast(whole, dtype)
        single = leaves(cast(rounded, torch.float32))
        one = value(config, single).total
        halves = leaves(rounded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = value(config, halves).total
        require_close(
            other, one, 1e-6, 1e-6, f"the value of {dtype} rows inside autocast, against the same in float32,"
        )
        wide = row_gradients(one, single)
        for v, gradient in row_gradients(other, halves).items():
            require_close(gradient.float(), wide[v], 0.02, 1e-3, f"the gradient of {v} in {dtype}")


def cast(whole: Embeddings, dtype: torch.dtype) -> Embeddings:
    return whole._replace(z={v: z.to(dtype) for v, z in whole.z.items()})


def check_differences(config: ObjectiveConfig, k: int) -> None:
    """The gradient is the derivative of the value along a random direction of each view and parameter, in float64."""
    if not config.differentiable():
        return
    whole, objective = leaves(table(k, seed=3, dtype=torch.float64)), build(config, k, torch.float64, spread=True)
    whole = whole._replace(labels=labels_of(whole.ids))
    if isinstance(objective, nn.Module):
        objective.eval()  # the same draws in every call, no dropout, no state
    inputs = whole.z | parameters(objective)
    gradients = torch.autograd.grad(
        objective(whole, whole).total, list(inputs.values()), materialize_grads=True, allow_unused=True
    )
    for i, (name, x) in enumerate(inputs.items()):
        direction, values = draw(70 + i, *x.shape), []
        for step in (STEP, -2 * STEP, STEP):  # there, to the other side, back
            with torch.no_grad():
                x.add_(direction, alpha=step)
                values.append(float(objective(whole, whole).total))
        found, wanted = float((gradients[i] * direction).sum()), (values[0] - values[1]) / (2 * STEP)
        near = math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-6)
        require(
            near, f"the gradient of {name} is {found:.9g} along a direction in which the value rises by {wanted:.9g}"
        )


def check_state(config: ObjectiveConfig, k: int) -> None:
    """What is saved after a step is all that the next one reads; evaluation gives one value and leaves no trace."""
    first, second = build(config, k, torch.float32), build(config, k, torch.float32)
    if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
        return
    with torch.no_grad():
        for p in first.parameters():
            p += 0.1
    first(table(k), table(k))
    second.load_state_dict(first.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        sample_state.save(first, Path(folder), 0)
        sample_state.restore(second, Path(folder))
    for objective in (first, second):
        objective.eval()
    before = state_of(first)
    values = [float(objective(table(k, 1), table(k, 1)).total.detach()) for objective in (first, first, second)]
    require(values[0] == values[1], f"the same batch is worth {values[0]:.9g} and then {values[1]:.9g} in evaluation")
    same = math.isclose(values[2], values[0], rel_tol=1e-6)
    require(same, f"a batch worth {values[0]:.9g} is worth {values[2]:.9g} after saving and loading")
    for name, x in state_of(first).items():
        require_close(x, before[name], 0, 0, f"the state {name} after evaluation")
    for objective in (first, second):
        objective.train()
    one, other = (objective(table(k, 1), table(k, 1)).total for objective in (first, second))
    require_close(other, one, 1e-5, 1e-6, "the next training step's value after saving and loading")


Views = Callable[[list[int]], list[int]]  # of the numbers of views that the settings take, those to check

# Draws of tuples by id, as symile has them, are all tuples at two views: ids are renamed at the fewest.
LAWS: tuple[tuple[str, Callable[[ObjectiveConfig, int], None], Views], ...] = (
    ("scalars", check_scalars, lambda views: views),
    ("matching", check_matching, lambda views: views[-2:][:1]),
    ("permutation", check_permutation, lambda views: views[:2]),
    ("absence", check_absence, lambda views: views[:2]),
    ("ids", check_ids, lambda views: views[:1]),
    ("extremes", check_extremes, lambda views: views[:2]),
    ("dtypes", check_dtypes, lambda views: views[-2:][:1]),
    ("differences", check_differences, lambda views: views[:2]),
    ("state", check_state, lambda views: views[-2:][:1]),
)

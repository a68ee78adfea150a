"""The laws of objectives: what holds for every kind, number of views and number of ranks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvpretrain import objectives
from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.distributed.pool import Pool
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.testing._laws import described, law, require, require_close, require_finite, settings_of
from mvpretrain.testing.tables import ROWS, SPLITS, draw, ids_and_presence, leaves, names, table
from mvpretrain.types import Embeddings, Losses, Objective

WIDTH, DIM = 5, 8  # of the inputs of linear towers, and of embeddings
MOST_VIEWS = 8
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


def numbers_of_views(config: ObjectiveConfig) -> list[int]:
    """The least three numbers of views that these settings take. ValueError: none up to 8."""
    found = [k for k in range(2, MOST_VIEWS + 1) if config.takes(k)][:3]
    if not found:
        raise ValueError(f"{described(config)} takes no number of views from 2 to {MOST_VIEWS}: see its takes(k)")
    return found


def build(
    config: ObjectiveConfig,
    k: int,
    dtype: torch.dtype,
    collectives: Collectives | None = None,
    spread: bool = False,
    dim: int = DIM,
) -> Objective:
    """The objective from one seed; with `spread`, parameters that would start equal differ."""
    torch.manual_seed(0)
    objective = objectives.build(config, names(k), collectives, dim)
    if spread:
        with torch.no_grad():
            for i, p in enumerate(parameters(objective).values()):
                p += draw(i, *p.shape).to(p) / 7
    return objective.to(dtype) if isinstance(objective, nn.Module) else objective


def parameters(objective: Objective) -> dict[str, nn.Parameter]:
    """The trainable ones by name; none where the objective is no module."""
    found = objective.named_parameters() if isinstance(objective, nn.Module) else ()
    return {name: p for name, p in found if p.requires_grad}


def value(config: ObjectiveConfig, whole: Embeddings) -> Losses:
    """A new objective's losses on one table in one process."""
    z = next(iter(whole.z.values()))
    return build(config, len(whole.z), z.dtype, dim=z.shape[1])(whole, whole)


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
    for v, gradient in row_gradients(total, whole).items():
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
    """float64 is computed in float64, and float32 comes near it."""
    whole = table(k, dtype=torch.float64)
    wanted = value(config, whole)
    require_scalars(wanted, torch.float64)
    found = value(config, cast(whole, torch.float32)).total
    require_close(found, wanted.total, 1e-3, 1e-4, "the value in float32, against float64,")


def cast(whole: Embeddings, dtype: torch.dtype) -> Embeddings:
    return whole._replace(z={v: z.to(dtype) for v, z in whole.z.items()})


def check_differences(config: ObjectiveConfig, k: int) -> None:
    """The gradient is the derivative of the value along a random direction of each view and parameter, in float64."""
    if not config.differentiable():
        return
    whole, objective = leaves(table(k, seed=3, dtype=torch.float64)), build(config, k, torch.float64, spread=True)
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
    first.eval(), second.eval()
    before = state_of(first)
    values = [float(objective(table(k, 1), table(k, 1)).total.detach()) for objective in (first, first, second)]
    require(values[0] == values[1], f"the same batch is worth {values[0]:.9g} and then {values[1]:.9g} in evaluation")
    same = math.isclose(values[2], values[0], rel_tol=1e-6)
    require(same, f"a batch worth {values[0]:.9g} is worth {values[2]:.9g} after saving and loading")
    for name, x in state_of(first).items():
        require_close(x, before[name], 0, 0, f"the state {name} after evaluation")
    first.train(), second.train()
    one, other = (objective(table(k, 1), table(k, 1)).total for objective in (first, second))
    require_close(other, one, 1e-5, 1e-6, "the next training step's value after saving and loading")


def state_of(objective: Objective) -> dict[str, Tensor]:
    """Copies of all tensors of the state dict, and of the numbers by sample id that this rank holds."""
    if not isinstance(objective, nn.Module):
        return {}
    found = {name: x.detach().clone() for name, x in objective.state_dict().items() if isinstance(x, Tensor)}
    for name, part in sample_state.of(objective):
        ids, rows = part.items()
        found |= {f"{name}/ids": ids.clone(), f"{name}/rows": rows.clone()}
    return found


class Outcome(NamedTuple):
    """What some steps without an optimiser gave: values and parts, means over ranks, and what they left."""

    values: list[Tensor]
    parts: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]  # of each view's tower and each parameter of the objective, summed over steps
    state: dict[str, Tensor]


def outcome(rank: int, config: ObjectiveConfig, k: int, dtype: torch.dtype, steps: int, size: int) -> Outcome:
    """Linear towers under the objective, on this rank's rows of new batches whose ids come back."""
    collectives = ProcessGroup() if size > 1 else SingleProcess()
    objective = build(config, k, dtype, collectives, spread=True)
    towers = {f"tower/{v}": draw(50 + i, WIDTH, DIM, dtype=dtype).requires_grad_() for i, v in enumerate(names(k))}
    trained = towers | parameters(objective)
    values, parts = [], []
    for step in range(steps):
        inputs = {v: draw(1000 * step + i, ROWS, WIDTH, dtype=dtype) for i, v in enumerate(names(k))}
        ids, present = ids_and_presence(k, seed=step)
        labels = torch.where(ids % 3 > 0, ids % 3, -1)
        mine = Embeddings(inputs, ids, present, labels).rows(rows_of_rank(rank, size, step))
        mine = mine._replace(z={v: normalize(x @ towers[f"tower/{v}"], dim=1) for v, x in mine.z.items()})
        losses = objective(*gather_embeddings(mine, collectives, getattr(objective, "gathers", None)))
        losses.total.backward()
        values.append(mean(losses.total.detach(), collectives))
        parts.append({name: mean(x, collectives) for name, x in losses.parts.items()})
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in trained.items()}
    gradients = {n: mean(g, collectives) for n, g in gradients.items()}
    return Outcome(values, parts, gradients, state_of(objective))


def rows_of_rank(rank: int, size: int, step: int) -> slice:
    """Unequal shares of a batch; on odd steps the last rank has nothing."""
    counts = list(SPLITS[size])
    if step % 2 and size > 1:
        counts[-2:] = counts[-2] + counts[-1], 0
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def mean(x: Tensor, collectives: Collectives) -> Tensor:
    """What an engine does: the average over ranks."""
    return collectives.sum(x) / collectives.size


Case = tuple[int, torch.dtype, int]  # views, type, steps


def outcomes(rank: int, config: ObjectiveConfig, cases: Sequence[Case], size: int) -> list[Outcome]:
    """All cases in one call of a rank."""
    return [outcome(rank, config, *case, size) for case in cases]


def check_slices(config: ObjectiveConfig, pool: Pool) -> None:
    """Values, parts, gradients and state on ranks are those of one process on the concatenated batch."""
    few, *more = numbers_of_views(config)
    middle, most = [*more, few][0], [few, *more][-1]
    cases = [(few, torch.float64, 1), (middle, torch.float64, 3), (most, torch.float32, 2)]
    wanted = outcomes(0, config, cases, 1)
    with law("slices", f"{described(config)} on {pool.size} ranks"):
        found = pool.run(outcomes, config, cases, pool.size)
    for i, (k, dtype, _) in enumerate(cases):
        with law("slices", f"{described(config)} of {k} views in {dtype} on {pool.size} ranks"):
            require_slices([rank[i] for rank in found], wanted[i], dtype)


def require_slices(ranks: Sequence[Outcome], alone: Outcome, dtype: torch.dtype) -> None:
    # Quotients of counts are float32 in any table: exact for halves and quarters, to 1e-7 for thirds.
    near, far = (1e-9, 1e-9) if len(ranks) != 3 else (1e-6, 1e-6)
    near, far = (near, far) if dtype == torch.float64 else (1e-5, 1e-4)
    for rank, found in enumerate(ranks):
        for step, wanted in enumerate(alone.values):
            what = f"the mean value over ranks in step {step}"
            require_close(found.values[step], wanted, near, near / 10, what)
            for name, x in alone.parts[step].items() if dtype == torch.float64 else ():
                require_close(found.parts[step][name], x, 1e-6, 1e-6, f"the part {name!r} in step {step}")
        for name, x in alone.gradients.items():
            error = float((found.gradients[name] - x).norm() / x.norm().clamp_min(1e-6))
            require(error < far, f"the gradient of {name} on rank {rank} is off by {error:.3g} of its norm")
    if dtype == torch.float64:
        require_states([found.state for found in ranks], alone.state, near, far)


def require_states(ranks: Sequence[dict[str, Tensor]], alone: dict[str, Tensor], rtol: float, atol: float) -> None:
    """State dicts are equal on every rank; ranks share out the ids, and each is held once."""
    for name, wanted in alone.items():
        pieces = [state[name] for state in ranks]
        if name.endswith(("/ids", "/rows")):
            order = torch.cat([state[f"{name.rpartition('/')[0]}/ids"] for state in ranks]).argsort()
            pieces = [torch.cat(pieces)[order]]
        for piece in pieces:
            require_close(piece, wanted, rtol, atol, f"the state {name} after all steps")


Views = Callable[[list[int]], list[int]]  # of the numbers of views that the settings take, those to check

# Draws of tuples by id, as symile has them, are all tuples at two views: ids are renamed at the fewest.
LAWS: tuple[tuple[str, Callable[[ObjectiveConfig, int], None], Views], ...] = (
    ("scalars", check_scalars, lambda views: views),
    ("matching", check_matching, lambda views: views[-2:][:1]),
    ("permutation", check_permutation, lambda views: views),
    ("absence", check_absence, lambda views: views),
    ("ids", check_ids, lambda views: views[:1]),
    ("extremes", check_extremes, lambda views: views[:2]),
    ("dtypes", check_dtypes, lambda views: views[-2:][:1]),
    ("differences", check_differences, lambda views: views[:2]),
    ("state", check_state, lambda views: views[-2:][:1]),
)

"""The law of slices: on any number of ranks, an objective does what it does in one process on the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain.distributed.collectives import Collectives, ProcessGroup, SingleProcess
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.distributed.pool import Pool
from mvpretrain.objectives import ObjectiveConfig
from mvpretrain.testing._building import DIM, build, numbers_of_views, parameters, state_of
from mvpretrain.testing._laws import described, law, require, require_close
from mvpretrain.testing.tables import ROWS, SPLITS, draw, ids_and_presence, labels_of, names
from mvpretrain.types import ChoosesGather, Embeddings

WIDTH = 5  # of the inputs of linear towers


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
        mine = Embeddings(inputs, ids, present, labels_of(ids)).rows(rows_of_rank(rank, size, step))
        mine = mine._replace(z={v: normalize(x @ towers[f"tower/{v}"], dim=1) for v, x in mine.z.items()})
        gathers = objective.gathers if isinstance(objective, ChoosesGather) else None
        losses = objective(*gather_embeddings(mine, collectives, gathers))
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
    views = numbers_of_views(config)
    middle = views[-2:][0]
    kept = any(name.endswith("/ids") for name in state_of(build(config, middle, torch.float64)))
    cases = [(views[0], torch.float32, 1), (middle, torch.float64, 3 if kept else 2)]
    wanted = outcomes(0, config, cases, 1)
    with law("slices", f"{described(config)} on {pool.size} ranks"):
        found = pool.run(outcomes, config, cases, pool.size)
    for i, (k, dtype, _) in enumerate(cases):
        with law("slices", f"{described(config)} of {k} views in {dtype} on {pool.size} ranks"):
            require_slices([rank[i] for rank in found], wanted[i], dtype)


def require_slices(ranks: Sequence[Outcome], alone: Outcome, dtype: torch.dtype) -> None:
    near, far = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
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

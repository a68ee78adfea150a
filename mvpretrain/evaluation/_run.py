"""All evaluators in one pass over the held-out data."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.evaluation import Evaluated, Evaluator, EvaluatorConfig, SeesBatches
from mvpretrain.evaluation._collect import collect
from mvpretrain.model.task import Task
from mvpretrain.types import Batch, Embeddings

FAILED = 2**31  # more figures than any evaluator has: says that a rank has none


def evaluate(
    task: Task,
    batches: Iterable[Batch],
    collectives: Collectives,
    device: torch.device,
    evaluators: Iterable[EvaluatorConfig],
) -> dict[str, float]:
    """Every evaluator's figures by name, the same on every rank.

    Every rank calls it with equally many batches; the caller sets evaluation mode, no_grad and autocast.

    An error of an evaluator is raised where it comes from. ValueError: no sample; on the other ranks, where an
    evaluator has failed on one; one that yields a name twice, or not equally many names on all ranks.
    """
    built = [(settings.kind, settings.build(task, collectives)) for settings in evaluators]
    shown = [evaluator for _, evaluator in built if isinstance(evaluator, SeesBatches)]

    def show(local: Embeddings, gathered: Embeddings) -> None:
        for evaluator in shown:
            evaluator.add(local, gathered)

    evaluated = Evaluated(task, collect(task, batches, collectives, device, on_batch=show), collectives, device)
    metrics: dict[str, float] = {}
    with torch.autocast(device.type, enabled=False):
        for kind, evaluator in built:
            found = figures(kind, evaluator, evaluated)
            twice = sorted(found.keys() & metrics.keys())
            if twice:
                raise ValueError(f"evaluator {kind!r} yields {twice[0]!r}, which another one has yielded; rename it")
            metrics |= found
    return metrics


def figures(kind: str, evaluator: Evaluator, evaluated: Evaluated) -> dict[str, float]:
    """One evaluator's figures, after all ranks have said that they have as many.

    A rank that failed alone would leave the others waiting for ever in the next collective.
    """
    collectives = evaluated.collectives
    try:
        found = {name: float(value) for name, value in evaluator(evaluated)}
    except Exception:
        collectives.largest(FAILED)
        raise
    most = collectives.largest(len(found))
    if most == FAILED:
        raise ValueError(f"evaluator {kind!r} failed on another rank, which says why")
    fewest = -collectives.largest(-len(found))
    if most != fewest:
        raise ValueError(
            f"evaluator {kind!r} yields {fewest} figures on one rank and {most} on another; let it yield the same on "
            "all of them"
        )
    return found

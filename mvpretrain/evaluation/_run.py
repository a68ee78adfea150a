"""Everything that a run measures about itself on held-out data, in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.evaluation._collect import collect
from mvpretrain.evaluation._settings import EvaluationConfig
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.model.task import Task
from mvpretrain.types import Batch, Embeddings


class MeanLoss:
    """The objective over the batches, each weighted by its samples; those differ in number only in the last batch.

    Contrastive losses grow with the number of candidates: compare values of equal batch sizes only. The students stand
    in for their teacher, and there is no queue.
    """

    def __init__(self, task: Task, collectives: Collectives):
        self.task, self.collectives = task, collectives
        self.sum: Tensor | float = 0.0
        self.rows = 0

    def add(self, local: Embeddings, every: Embeddings) -> None:
        with torch.autocast(local.ids.device.type, enabled=False):
            losses = self.task.objective(*map(self.task.teacher.students_as_teacher, (local, every)))
        rows = int(torch.stack(list(every.present.values())).any(dim=0).sum())
        self.sum += rows * losses.total.detach().double()
        self.rows += rows

    def value(self) -> float:
        """The mean over ranks; every rank calls it."""
        assert isinstance(self.sum, Tensor)
        return float(self.collectives.sum(self.sum)) / self.collectives.size / max(1, self.rows)


def evaluate(
    task: Task, batches: Iterable[Batch], collectives: Collectives, device: torch.device, config: EvaluationConfig
) -> dict[str, float]:
    """Retrieval between all views and `val/loss`, the same on every rank.

    Every rank calls it with equally many batches; the caller sets evaluation mode, no_grad and autocast.
    """
    loss = MeanLoss(task, collectives)
    table = collect(task, batches, collectives, device, watch=loss.add)
    with torch.autocast(device.type, enabled=False):
        return {"val/loss": loss.value(), **dict(retrieval(table, collectives, device, config.by_label))}

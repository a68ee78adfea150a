"""Everything that a run measures about itself on held-out data, in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mvpretrain.evaluation.collect import collect
from mvpretrain.evaluation.retrieval import retrieval
from mvpretrain.exchange import Exchange
from mvpretrain.recipe import EvaluationConfig
from mvpretrain.task import Task
from mvpretrain.types import Batch, Embeddings


class MeanLoss:
    """The objective over the batches, each weighted by its samples; those differ in number only in the last batch.

    Contrastive losses grow with the number of candidates: compare values of equal batch sizes only. The students stand
    in for their teacher, and there is no queue.
    """

    def __init__(self, task: Task, exchange: Exchange):
        self.task, self.exchange = task, exchange
        self.sum: Tensor | float = 0.0
        self.rows = 0

    def add(self, local: Embeddings, every: Embeddings) -> None:
        with torch.autocast(local.ids.device.type, enabled=False):
            losses = self.task.objective(*map(self.task.teacher.stood_in_for, (local, every)))
        rows = int(torch.stack(list(every.present.values())).any(dim=0).sum())
        self.sum += rows * losses.total.detach().double()
        self.rows += rows

    def value(self) -> float:
        """The mean over ranks; every rank calls it."""
        assert isinstance(self.sum, Tensor)
        return float(self.exchange.sum(self.sum)) / self.exchange.size / max(1, self.rows)


def evaluate(
    task: Task, batches: Iterable[Batch], exchange: Exchange, device: torch.device, config: EvaluationConfig
) -> dict[str, float]:
    """Retrieval between all views and `val/loss`, the same on every rank.

    Every rank calls it with equally many batches; the caller sets evaluation mode, no_grad and autocast.
    """
    loss = MeanLoss(task, exchange)
    table = collect(task, batches, exchange, device, watch=loss.add)
    with torch.autocast(device.type, enabled=False):
        return {"val/loss": loss.value(), **dict(retrieval(table, exchange, device, config.by_label))}

"""The objective on held-out data: `val/loss`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.evaluation import Evaluated, EvaluatorConfig
from mvpretrain.model.task import Task
from mvpretrain.types import Embeddings


class LossConfig(EvaluatorConfig):
    """The run's objective as it stands."""

    kind: Literal["loss"] = "loss"

    def build(self, task: Task, collectives: Collectives) -> MeanLoss:
        return MeanLoss(task)


class MeanLoss:
    """The objective's mean over the batches, each weighted by its samples: they differ in number in the last batch.

    Contrastive losses grow with the number of candidates: compare values of equal batch sizes only. The students stand
    in for their teacher, and there is no queue.
    """

    def __init__(self, task: Task):
        self.task = task
        self.sum: Tensor | float = 0.0
        self.rows = 0

    def add(self, local: Embeddings, gathered: Embeddings) -> None:
        with torch.autocast(local.ids.device.type, enabled=False):
            losses = self.task.objective(*map(self.task.teacher.students_as_teacher, (local, gathered)))
        rows = int(torch.stack(list(gathered.present.values())).any(dim=0).sum())
        self.sum += rows * losses.total.detach().double()
        self.rows += rows

    def __call__(self, evaluated: Evaluated) -> Iterator[tuple[str, float]]:
        """Yields `val/loss`, the mean over ranks."""
        assert isinstance(self.sum, Tensor)
        collectives = evaluated.collectives
        yield "val/loss", float(collectives.sum(self.sum)) / collectives.size / max(1, self.rows)

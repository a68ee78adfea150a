"""Towers, heads and objective as the one module that an engine wraps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mvpretrain.config import errors_at
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import gather_embeddings
from mvpretrain.model.heads import unit
from mvpretrain.model.health import health
from mvpretrain.model.phase_timer import PhaseTimer
from mvpretrain.model.teacher import Teacher, TeacherConfig
from mvpretrain.model.tower import Tower, TowerConfig
from mvpretrain.types import Batch, ChoosesGather, Embeddings, Losses, Objective, View


class EmbeddingGradients(NamedTuple):
    """The gradient of the objective's loss in some rows' z, and in its own parameters."""

    z: dict[str, Tensor]  # b d
    parameters: list[Tensor]  # in the order of `Task.objective_parameters`, or empty


class Task(nn.Module):
    """k views in, losses out: encode, gather once, objective.

    `views` maps a view to its tower; views that share a tower and a shape go through it in one call. Every tower runs
    on every row of every step, absent rows included (they hold filler), so that no rank ever skips a module: engines
    that reduce or gather by module cannot deadlock. `dim` is the width of one head; a row holds all `heads` of them.
    """

    def __init__(
        self,
        views: Mapping[str, str],
        towers: Mapping[str, TowerConfig],
        dim: int,
        objective: Objective,
        collectives: Collectives,
        heads: int = 1,
        teacher: TeacherConfig | None = None,
    ):
        super().__init__()
        self.views, self.heads = dict(views), heads
        built = {name: Tower(config, dim, heads, f"towers.{name}") for name, config in towers.items()}
        self.towers = nn.ModuleDict(built)
        self.teacher = Teacher(teacher, views, self.towers, heads * dim, collectives)
        self.objective = objective
        self.collectives = collectives
        self.phase_timer = PhaseTimer()

    def encode(self, batch: Batch) -> Embeddings:
        """Unit rows per view, float32 (float64 stays)."""
        return Embeddings(self.unit_rows(batch, self.towers, self.views), batch.ids, batch.present, batch.labels)

    def table(self, batch: Batch) -> Embeddings:
        """What the objective reads of these rows: `encode`, and the teacher's views as more views, without a graph."""
        local = self.encode(batch)
        with torch.no_grad():
            return self.teacher.add_views(local, self.unit_rows(batch, self.teacher.towers, self.teacher.views))

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The encoders' outputs before the heads: what probes and fine-tuning read."""
        encoders = {name: cast(Tower, tower).encoder for name, tower in self.towers.items()}
        return self.through(batch, encoders, self.views)

    def unit_rows(self, batch: Batch, towers: nn.ModuleDict, views: Mapping[str, str]) -> dict[str, Tensor]:
        """`Tower.embed` of each view, those that share a tower in one call."""
        return {v: unit(x, self.heads) for v, x in self.through(batch, towers, views).items()}

    def through(
        self, batch: Batch, modules: Mapping[str, nn.Module] | nn.ModuleDict, views: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Each view through the module of its tower; `views` are the task's own, or the teacher's."""
        data = {v: batch.views[self.teacher.originals.get(v, v)] for v in views}
        together: dict[tuple[str, Any], list[str]] = defaultdict(list)
        for v, tower in views.items():
            view = data[v]
            together[tower, (view.data.shape, view.mask is None)].append(v)
        out = {}
        for (tower, _), names in together.items():
            with errors_at(f"towers.{tower}"):
                result = modules[tower](View.cat([data[v] for v in names]))
            out.update(zip(names, result.chunk(len(names))))
        return {v: out[v] for v in views}

    def forward(self, batch: Batch, gradients: EmbeddingGradients | None = None) -> Losses | Tensor:
        """The losses; with `gradients`, a scalar whose gradient is what these rows add to that of the loss."""
        with self.phase_timer("encode"):
            local = self.table(batch) if gradients is None else self.encode(batch)
        return self.score(local) if gradients is None else self.weighted_by(local, gradients)

    def score(self, local: Embeddings) -> Losses:
        """The losses of a table of this rank's rows: gather once, objective; in training, the queue takes them in."""
        queue = self.teacher.queue
        with torch.autocast(local.ids.device.type, enabled=False):
            with self.phase_timer("gather"):
                gathers = self.objective.gathers if isinstance(self.objective, ChoosesGather) else None
                padded, gathered = gather_embeddings(local, self.collectives, gathers)
            with self.phase_timer("objective"):
                losses = self.objective(*(queue.append_queue(padded, gathered) if queue else (padded, gathered)))
            if queue and self.training:
                queue.push(padded, gathered)
            students = local._replace(z={v: local.z[v] for v in self.views})
            return Losses(losses.total, {**losses.parts, **health(students)})

    def weighted_by(self, local: Embeddings, gradients: EmbeddingGradients) -> Tensor:
        """sum <z, dL/dz>, and the same of the objective's parameters."""
        own = zip(self.objective_parameters(), gradients.parameters, strict=True) if gradients.parameters else ()
        pairs = [*((z, gradients.z[v]) for v, z in local.z.items()), *own]
        total = sum((x * gradient).sum() for x, gradient in pairs)
        assert isinstance(total, Tensor)
        return total

    def encoding_modules(self) -> list[nn.Module]:
        """The towers, the teacher's too: what engines compile, and whose statistics are rank 0's in evaluation."""
        return [*self.towers.values(), *self.teacher.towers.values()]

    def update_ema(self, part: Callable[[nn.Parameter], Tensor] = lambda p: p) -> list[nn.Parameter]:
        """Let the teacher take a step towards the towers; returns its parameters. See `Teacher.update_ema`."""
        return self.teacher.update_ema(self.towers, part)

    def objective_parameters(self) -> list[nn.Parameter]:
        """Those that the objective itself trains."""
        return [p for name, p in self.named_parameters() if name.startswith("objective.") and p.requires_grad]

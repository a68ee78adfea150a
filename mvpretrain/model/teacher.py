"""The EMA teacher: towers that average the trained ones, whose rows are more views, and a queue of past rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from mvpretrain.config import Config, unknown
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.model.queue import Queue
from mvpretrain.types import Embeddings

MARK = "@teacher"


class TeacherConfig(Config):
    """Towers that average the trained ones and are not trained (He et al. 2020, "Momentum Contrast", eq. 2).

    After every step, each weight becomes momentum teacher + (1 - momentum) student. The teacher embeds `views` (all
    where not given) without a gradient, and the objective is given them as more views, `a@teacher` of `a`. One that
    takes all views takes these too, also a teacher's view against another; name views or pairs to choose.

    `queue` keeps so many of the teacher's last rows, which the objective is given as rows of samples that have no other
    view: more candidates at the price of memory alone. A row whose id is in the present batch is a positive.
    """

    momentum: float = Field(default=0.99, ge=0, le=1)
    views: tuple[str, ...] | None = None
    queue: int = Field(default=0, ge=0)

    def of(self, views: Iterable[str]) -> list[str]:
        """Those of the views that the teacher embeds."""
        return list(views if self.views is None else self.views)

    def names(self, views: Iterable[str]) -> list[str]:
        """What they are called in the objective's table."""
        return [v + MARK for v in self.of(views)]

    def check(self, views: Sequence[str], ranks: int | None) -> None:
        """ValueError: no such view, one named twice or not at all, a name that is taken, a queue that does not fit."""
        chosen = self.of(views)
        for v in chosen:
            if v not in views:
                raise ValueError(unknown("view in teacher.views", v, views))
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"teacher.views is {chosen}; name each view that the teacher embeds once")
        for name in self.names(views):
            if name in views:
                raise ValueError(f"view {name!r} has the name of what the teacher makes of another one; rename it")
        if ranks:
            self.refuse_uneven(ranks)

    def refuse_uneven(self, ranks: int) -> None:
        """ValueError where the queue does not divide over the ranks."""
        if self.queue % ranks:
            raise ValueError(
                f"teacher.queue={self.queue} does not divide over {ranks} ranks; make it a multiple of {ranks}"
            )


class Teacher(nn.Module):
    """The teacher's towers, and the queue. Without settings it has no view, no weight and no effect.

    State: copies of the towers that its views need, and the queue's (see there). Batch statistics are its own.
    """

    def __init__(
        self,
        config: TeacherConfig | None,
        views: Mapping[str, str],
        towers: nn.ModuleDict,
        dim: int,
        collectives: Collectives,
    ):
        super().__init__()
        chosen = config.of(views) if config else []
        self.momentum = config.momentum if config else 1.0
        self.originals = {v + MARK: v for v in chosen}
        self.views = {name: views[v] for name, v in self.originals.items()}  # to the tower, as in the task
        self.towers = nn.ModuleDict({t: deepcopy(towers[t]) for t in dict.fromkeys(self.views.values())})
        self.towers.requires_grad_(False)
        self.queue = None
        if config and config.queue:
            config.refuse_uneven(collectives.size)
            self.queue = Queue(list(self.views), config.queue, dim, collectives)

    def add_views(self, table: Embeddings, z: Mapping[str, Tensor]) -> Embeddings:
        """The students' table with the teacher's rows of the same samples as more views."""
        present = {name: table.present[v] for name, v in self.originals.items()}
        return table._replace(z={**table.z, **z}, present={**table.present, **present})

    def students_as_teacher(self, table: Embeddings) -> Embeddings:
        """The table with the students' rows in place of the teacher's, as evaluation compares them."""
        return self.add_views(table, {name: table.z[v] for name, v in self.originals.items() if v in table.z})

    @torch.no_grad()
    def update_ema(
        self, towers: nn.ModuleDict, part: Callable[[nn.Parameter], Tensor] = lambda p: p
    ) -> list[nn.Parameter]:
        """teacher = momentum teacher + (1 - momentum) student; returns the teacher's parameters.

        `part` is what this rank holds of a parameter.
        """
        moved = []
        for name, tower in self.towers.items():
            for own, student in zip(tower.parameters(), towers[name].parameters(), strict=True):
                part(own).lerp_(part(student), 1 - self.momentum)  # where both are equal, not a bit changes
                moved.append(own)
        return moved

    def restart(self, towers: nn.ModuleDict) -> None:
        """Begin where the students are."""
        for name, tower in self.towers.items():
            tower.load_state_dict(towers[name].state_dict())

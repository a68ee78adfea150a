"""Several objectives in one run, on one gather."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from mvpretrain.config import Config, unknown
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.objectives import ObjectiveConfig, registry
from mvpretrain.objectives._inputs import any_rows
from mvpretrain.types import ChoosesGather, Embeddings, Losses, Objective


class Term(Config):
    """One objective of a sum: over `views` (all where not given), called `name` in the log (its kind where not given).

    A term of weight 0 is computed and logged, and trains nothing.
    """

    objective: Annotated[SerializeAsAny[ObjectiveConfig], registry]
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    views: tuple[str, ...] | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.objective.kind

    def of(self, views: Sequence[str]) -> list[str]:
        return list(views if self.views is None else self.views)


class SumConfig(ObjectiveConfig):
    """Weighted sum of objectives, each over all views or some: `terms: [{objective: {kind: ...}, weight: 1}, ...]`."""

    kind: Literal["sum"] = "sum"
    terms: tuple[Term, ...]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        return [
            {
                "terms": [
                    {"objective": {"kind": "infonce"}, "weight": 0.5},
                    {"objective": {"kind": "dcl"}, "views": ["view1", "view0"], "name": "first two"},
                ]
            },
            {
                "terms": [
                    {"objective": {"kind": "sigmoid", "per_pair": True}, "weight": 2},
                    {"objective": {"kind": "infonce", "in_view": True}},
                ]
            },
        ]

    def takes(self, k: int) -> bool:
        return all(term.objective.takes(k if term.views is None else len(term.views)) for term in self.terms)

    def differentiable(self) -> bool:
        return all(term.objective.differentiable() for term in self.terms)

    @model_validator(mode="after")
    def _terms(self) -> SumConfig:
        if not self.terms:
            raise ValueError("objective.terms is empty; a sum needs a term: {objective: {kind: ...}, weight: 1.0}")
        if not any(term.weight for term in self.terms):
            raise ValueError("objective.terms all have weight 0; give one of them a weight above 0")
        for title, count in Counter(term.title for term in self.terms).items():
            if count > 1:
                raise ValueError(f"objective.terms has {count} terms called {title!r}; give each a name of its own")
        heads = {term.title: term.objective.projection_heads() for term in self.terms}
        if len(set(heads.values())) > 1:
            asked = ", ".join(f"{title} {count}" for title, count in heads.items())
            raise ValueError(
                f"objective.terms read one table, and ask for unequal numbers of heads ({asked}); make them equal"
            )
        return self

    def check(self, views: Sequence[str]) -> None:
        for index, term in enumerate(self.terms):
            where = f"objective.terms.{index}"
            chosen = term.of(views)
            for v in chosen:
                if v not in views:
                    raise ValueError(unknown(f"view in {where}.views", v, views))
            if len(chosen) < 2 or len(set(chosen)) < len(chosen):
                raise ValueError(f"{where}.views is {chosen}; an objective compares two different views or more")
            try:
                term.objective.check(chosen)
            except ValueError as error:
                raise ValueError(f"{where} ({term.title}): {error}") from error

    def projection_heads(self) -> int:
        return self.terms[0].objective.projection_heads()

    def for_dim(self, dim: int) -> SumConfig:
        terms = [term.model_copy(update={"objective": term.objective.for_dim(dim)}) for term in self.terms]
        return self.model_copy(update={"terms": tuple(terms)})

    def build(self, views: Sequence[str], collectives: Collectives) -> Sum:
        objectives = [term.objective.build(term.of(views), collectives) for term in self.terms]
        return Sum(self.terms, [term.of(views) for term in self.terms], objectives)

    def memory(self, views: int, rows: int, gathered: int, dim: int) -> int:
        """The gathered table once, and what each term holds besides: all graphs live until the backward."""
        table = super().memory
        total = table(views, rows, gathered, dim)
        for term in self.terms:
            k = views if term.views is None else len(term.views)
            total += term.objective.memory(k, rows, gathered, dim) - table(k, rows, gathered, dim)
        return total


class Sum(nn.Module):
    """sum_t weight_t L_t over the terms; each sees the columns of its views of the one gathered table.

    Parts are those of the terms, prefixed by the term's name ("infonce/loss/a-b"), and `loss/NAME` for each term's own
    value before its weight. State: that of the terms.
    """

    def __init__(self, terms: Sequence[Term], views: Sequence[Sequence[str]], objectives: Sequence[Objective]):
        super().__init__()
        self.terms, self.views, self.objectives = terms, views, objectives
        # An objective may be any callable; those that are modules are found here by engines and checkpoints.
        self.stateful = nn.ModuleDict({str(i): x for i, x in enumerate(objectives) if isinstance(x, nn.Module)})

    def gathers(self, rows: int, dim: int) -> bool:
        """See `ChoosesGather`: where a term wants the gathered rows, the others use them too."""
        return any(not isinstance(x, ChoosesGather) or x.gathers(rows, dim) for x in self.objectives)

    @any_rows
    def forward(self, local: Embeddings, gathered: Embeddings) -> Losses:
        parts: dict[str, Tensor] = {}
        weighted = []
        for term, views, objective in zip(self.terms, self.views, self.objectives):
            losses = objective(columns(local, views), columns(gathered, views))
            weighted.append(term.weight * losses.total)
            parts[f"loss/{term.title}"] = losses.total.detach()
            parts |= {f"{term.title}/{name}": value for name, value in losses.parts.items()}
        return Losses(torch.stack(weighted).sum(), parts)


def columns(table: Embeddings, views: Sequence[str]) -> Embeddings:
    """The table with these views only."""
    z = {v: table.z[v] for v in views if v in table.z}  # the gathered table may come without
    return table._replace(z=z, present={v: table.present[v] for v in views})

"""What a recipe says of evaluation in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, SerializeAsAny, model_validator

from mvpretrain.config import Config
from mvpretrain.evaluation import EvaluatorConfig, registry


class EvaluationConfig(Config):
    """`val/loss` and retrieval between all views on `data.eval`, every so many steps (0: only at the end).

    `by_label` names views whose pairs are scored by label: any sample of the query's class is a hit. `limit` caps the
    samples. `also` adds evaluators, each by its `kind` and settings: a file of mvpretrain/evaluation, or
    package.module:Class. Probes are the business of `mvpretrain evaluate`, after the run.
    """

    every: int = Field(default=0, ge=0)
    by_label: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=2)
    also: tuple[Annotated[SerializeAsAny[EvaluatorConfig], registry], ...] = ()

    @model_validator(mode="after")
    def _cross_check(self) -> EvaluationConfig:
        kinds = [evaluator.kind for evaluator in self.also]
        for kind in kinds:
            if kind in ("loss", "retrieval") or kinds.count(kind) > 1:
                raise ValueError(
                    f"evaluation.also: kind {kind!r} would give the same names twice; loss and retrieval are always "
                    "there, any other kind once"
                )
        return self

    def evaluators(self) -> Iterator[EvaluatorConfig]:
        """Settings of every evaluator, in the order of their figures."""
        yield registry.parse({"kind": "loss"})
        yield registry.parse({"kind": "retrieval", "by_label": self.by_label})
        yield from self.also

"""What a recipe says of evaluation in training."""

from __future__ import annotations

from pydantic import Field

from mvpretrain.config import Config


class EvaluationConfig(Config):
    """Retrieval and probes on `data.eval`, every so many steps (0: only at the end).

    `by_label` names views whose pairs are scored by label: any sample of the query's class is a hit. `limit` caps the
    samples. Probes are the business of `mvpretrain evaluate`, after the run.
    """

    every: int = Field(default=0, ge=0)
    by_label: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=2)

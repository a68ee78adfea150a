"""The registry of evaluators: figures of held-out data while a run trains. A recipe adds some by `evaluation.also`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.evaluation._collect import Table
from mvpretrain.model.task import Task
from mvpretrain.registry import External, Kind, Registry, build_external
from mvpretrain.types import Embeddings


class Evaluated(NamedTuple):
    """What evaluators look at, the same on every rank."""

    task: Task  # in evaluation mode; no gradients, and outside of `add` no autocast
    table: Table  # every sample's unit rows, on the CPU
    collectives: Collectives
    device: torch.device


@runtime_checkable
class Evaluator(Protocol):
    """Yields (name, value): the same names and values on every rank.

    Built anew for each evaluation. Every rank calls it and exhausts it, so that it may use `evaluated.collectives`; a
    rank must not leave a collective out that the others take part in.
    """

    def __call__(self, evaluated: Evaluated) -> Iterable[tuple[str, float]]: ...


@runtime_checkable
class SeesBatches(Protocol):
    """Optional: an evaluator that is also shown each batch's tables while they are collected."""

    def add(self, local: Embeddings, gathered: Embeddings) -> None:
        """This rank's rows of a batch and those of all ranks, as an objective is given them."""
        ...


class EvaluatorConfig(Kind):
    """Settings of an evaluator."""

    def build(self, task: Task, collectives: Collectives) -> Evaluator:
        raise TypeError(f"{type(self).__name__} must define build")


class ExternalEvaluator(EvaluatorConfig, External):
    """A user's own class whose objects are called with `Evaluated`, by import path."""

    context: ClassVar[tuple[str, ...]] = ("task", "collectives")

    def build(self, task: Task, collectives: Collectives) -> Evaluator:
        evaluator = build_external(self, task=task, collectives=collectives)
        if not isinstance(evaluator, Evaluator):
            raise ValueError(
                f"evaluator kind {self.kind!r} cannot be called; give it __call__(evaluated), see "
                "mvpretrain.evaluation.Evaluator"
            )
        return evaluator


registry = Registry("mvpretrain.evaluation", EvaluatorConfig, ExternalEvaluator, "evaluator")

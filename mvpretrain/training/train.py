"""A recipe to a trained run: what the loop needs is built here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from mvpretrain.data.build import count_samples, describe_damages
from mvpretrain.data.loader import Stream
from mvpretrain.engine import Engine, World, encoding, resolve, start, wrap
from mvpretrain.engine.optimizer import build_optimizer
from mvpretrain.evaluation._run import evaluate
from mvpretrain.evaluation._settings import EvaluationConfig
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.training import checkpoint
from mvpretrain.training.loop import LoopSettings, run_loop, seed_generators


def train(recipe: Recipe, resume: bool = False, trust: bool = False) -> Path:
    """Run a recipe to its end, on as many ranks as the launcher started; returns the run's folder.

    With `resume`, goes on from the last checkpoint with exactly the batches, generators and states that an
    uninterrupted run would have.

    ValueError: the recipe, the data, the launcher or the checkpoint do not fit. FloatingPointError and
    training.loop.Preempted: see `run_loop`.
    """
    found = checkpoint_to_resume(recipe, resume)
    # What can be refused is refused here: a process group that is waited for in vain costs minutes, not seconds.
    resolved = resolve(recipe.engine)
    stream, held_out = (recipe.stream(split, resolved.rank, resolved.size) for split in ("train", "eval"))
    assert stream is not None
    if found:
        checkpoint.refuse_other_world(found, resolved.kind, resolved.size)
        if not trust:
            checkpoint.refuse_pickles(found, resolved.kind, recipe.dump() if recipe.trusted else None)
    settings = loop_settings(recipe, recipe.total_steps(count_samples(stream.sources)))
    world = start(resolved)
    task, optimizer = build_task(recipe, world)
    evaluation = evaluation_on(held_out, recipe.evaluation) if held_out else None
    notes = [f"a tar breaks off and is used up to there: {damage}" for damage in describe_damages(stream.sources)]
    if resume and not found:
        notes.append(f"{settings.run} holds no checkpoint yet: starting at step 0")
    run_loop(world, task, optimizer, stream, settings, found, evaluation, notes)
    return settings.run


def checkpoint_to_resume(recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a fresh run, which `resume` may be too: schedulers always ask for it.

    ValueError: a run is there already.
    """
    run = Path(recipe.run)
    known = checkpoint.saved(run)
    if known and not resume:
        raise ValueError(
            f"{run} already holds {known[-1].name}; add --resume to go on with it, or run=OTHER to begin another"
        )
    return known[-1] if known else None


def loop_settings(recipe: Recipe, steps: int) -> LoopSettings:
    """What the loop uses of a recipe, for so many steps in all."""
    return LoopSettings(
        run=Path(recipe.run),
        seed=recipe.seed,
        batch=recipe.batch,
        steps=steps,
        loader=recipe.loader,
        engine=recipe.engine,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        log=recipe.log,
        checkpoint=recipe.checkpoint,
        evaluation=recipe.evaluation,
        max_nonfinite=recipe.max_nonfinite,
        recipe=recipe.dump(),
    )


def build_task(recipe: Recipe, world: World) -> tuple[Task, torch.optim.Optimizer]:
    """The recipe's task with the weights that it starts from, on this rank's device, and its optimiser."""
    seed_generators(recipe.seed)  # the same on every rank: the towers must start equal
    task = recipe.task(world.collectives)
    if recipe.init:
        start_from(task, recipe.init)
    task.to(world.device)
    return task, build_optimizer(task, recipe.towers, recipe.optimizer)


def build_engine(recipe: Recipe, world: World) -> Engine:
    """The recipe's task under its engine."""
    return wrap(world, *build_task(recipe, world), recipe.engine, recipe.batch)


def start_from(task: Task, path: str) -> None:
    """Weights of another run; what they lack stays as it is. ValueError: other shapes, or nothing that fits.

    A teacher that they lack begins where the towers are; a queue begins empty.
    """
    weights = {name: value for name, value in load_file(path).items() if not name.startswith("teacher.queue.")}
    known = task.state_dict()
    misfits = [k for k in weights if k in known and weights[k].shape != known[k].shape]
    if misfits or not weights.keys() & known.keys():
        name = (misfits or [*weights])[0]
        here = list(known[name].shape) if misfits else "nothing"
        raise ValueError(
            f"init={path}: {name!r} is {list(weights[name].shape)} there and {here} in this recipe ({len(misfits)} of "
            f"{len(weights)} such tensors: size mismatch); give the towers the sizes they had"
        )
    task.load_state_dict(weights, strict=False)
    if not any(name.startswith("teacher.") for name in weights):
        task.teacher.restart(task.towers)


def evaluation_on(stream: Stream, config: EvaluationConfig) -> Callable[[Engine], dict[str, float]]:
    """All evaluators of the settings on a stream's samples, called by every rank."""
    return partial(_evaluate, stream, config)


def _evaluate(stream: Stream, config: EvaluationConfig, engine: Engine) -> dict[str, float]:
    world = engine.world
    with encoding(engine) as task:
        batches = stream.whole(config.limit)
        return evaluate(task, batches, world.collectives, world.device, config.evaluators())

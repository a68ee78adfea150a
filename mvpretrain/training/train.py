"""The loop."""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mvpretrain.data.build import count_samples, describe_damages
from mvpretrain.data.loader import BadSamples, Stream
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.engine import Engine, Step, World, encoding, resolve, start, wrap
from mvpretrain.engine.optimizer import build_optimizer
from mvpretrain.engine.schedule import set_rate
from mvpretrain.evaluation._run import evaluate
from mvpretrain.files import write_text
from mvpretrain.loggers import RunInfo
from mvpretrain.loggers._metrics import MetricsLogger
from mvpretrain.model.phase_timer import PhaseTimer
from mvpretrain.model.task import Task
from mvpretrain.recipe import Recipe
from mvpretrain.training import checkpoint
from mvpretrain.training.checkpoint import TrainState

PREEMPTED = 75  # exit code of a run that was told to stop and saved: start it again with --resume


class Preempted(Exception):
    """SIGTERM or SIGINT arrived; the checkpoint is written."""


def train(recipe: Recipe, resume: bool = False, trust: bool = False) -> Path:
    """Run a recipe to its end, on as many ranks as the launcher started; returns the run's folder.

    With `resume`, goes on from the last checkpoint with exactly the batches, generators and states that an
    uninterrupted run would have. ValueError: the recipe, the data, the launcher or the checkpoint do not fit;
    Preempted: told to stop, after saving.
    """
    run = Path(recipe.run)
    found = checkpoint_to_resume(recipe, resume)
    # What can be refused is refused here: a process group that is waited for in vain costs minutes, not seconds.
    resolved = resolve(recipe.engine)
    stream, validation = (recipe.stream(split, resolved.rank, resolved.size) for split in ("train", "eval"))
    assert stream is not None
    if found:
        checkpoint.refuse_other_world(found, resolved.kind, resolved.size)
        if not trust:
            checkpoint.refuse_pickles(found, resolved.kind, recipe.dump() if recipe.trusted else None)
    steps = recipe.total_steps(count_samples(stream.sources))
    world = start(resolved)
    engine = build_engine(recipe, world)
    _seed(recipe.seed + 1 + world.rank)  # ranks draw apart; those that a checkpoint knows go on with what they had
    state = resumed(found, engine) if found else TrainState(0, stream.start(), {}, {})
    if world.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "recipe.yaml", recipe.dump())
    info = RunInfo(run, recipe.model_dump(mode="json"), steps, state.step)
    log = MetricsLogger(recipe.log, info, active=world.rank == 0)
    log.say(f"# {world.kind} on {world.size} process(es), {world.device.type}, {world.precision}\n{recipe.dump()}")
    for damage in describe_damages(stream.sources):
        log.say(f"a tar breaks off and is used up to there: {damage}")
    if resume:
        log.say(f"going on after step {state.step}" if found else f"{run} holds no checkpoint yet: starting at step 0")
    try:
        _Loop(recipe, engine, stream, validation, steps, run, log).go(state)
    finally:
        log.close()
    return run


def resumed(found: Path, engine: Engine) -> TrainState:
    """Engine and state of a checkpoint, under the rates and decays of the recipe: those may be changed on resuming."""
    chosen = [(g["base_lr"], g["weight_decay"]) for g in engine.optimizer.param_groups]
    state = checkpoint.restore(found, engine)
    for group, (rate, decay) in zip(engine.optimizer.param_groups, chosen):
        group["base_lr"], group["weight_decay"] = rate, decay
    return state


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


def build_engine(recipe: Recipe, world: World) -> Engine:
    """The recipe's task, with the weights that it starts from, under its engine."""
    _seed(recipe.seed)  # the same on every rank: the towers must start equal
    task = recipe.task(world.collectives)
    if recipe.init:
        start_from(task, recipe.init)
    task.to(world.device)
    return wrap(world, task, build_optimizer(task, recipe.towers, recipe.optimizer), recipe.engine, recipe.batch)


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


class _Loop:
    """One run's steps: data, step, log, evaluation, checkpoint, in this order, the same on every rank."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        stream: Stream,
        validation: Stream | None,
        steps: int,
        run: Path,
        log: MetricsLogger,
    ):
        self.recipe, self.engine, self.stream, self.validation = recipe, engine, stream, validation
        self.steps, self.run, self.log = steps, run, log

    def go(self, state: TrainState) -> None:
        recipe = self.recipe
        bad = BadSamples(recipe.loader.max_bad_share, recipe.loader.max_bad_in_row)
        watch, lost = self.engine.task.phase_timer, 0
        clock = Clock(recipe.batch, watch)
        with stop_signals() as told:
            batches = self.stream.batches(state.cursor)
            while state.step < self.steps:
                with watch("data"):
                    batch, cursor, skipped = next(batches)
                set_rate(self.engine.optimizer, recipe.schedule.factor(state.step, self.steps))
                done = self.engine.step(batch, [len(told), skipped.total()])
                stop, missed = done.sums
                reasons = skipped + Counter({"on other ranks": round(missed) - skipped.total()})
                bad.add(reasons, recipe.batch)
                state = TrainState(state.step + 1, cursor, dict(Counter(state.skipped) + reasons), state.metrics)
                lost = 0 if done.stepped else lost + 1
                self.check_finite(state.step, lost, done)
                self.log.step(state.step)
                if state.step % recipe.log.every == 0 or state.step == self.steps:
                    self.log.write(state.step, self.figures(state, done, clock))
                state = self.after(state, bool(stop))
                if stop:
                    raise Preempted(f"told to stop after step {state.step} of {self.steps}; saved, go on with --resume")

    def after(self, state: TrainState, stop: bool) -> TrainState:
        """Evaluation and checkpoint where they are due."""
        last = state.step == self.steps
        every = self.recipe.evaluation.every
        improved = False
        if self.validation and (last or (every and state.step % every == 0)):
            metrics = self.evaluate()
            self.log.write(state.step, metrics)
            state = state._replace(metrics=metrics)
            improved = self.note_best(state)
        if last or stop or improved or state.step % self.recipe.checkpoint.every == 0:
            checkpoint.save(self.run, self.engine, self.recipe, state)
        return state

    def evaluate(self) -> dict[str, float]:
        assert self.validation
        world, config = self.engine.world, self.recipe.evaluation
        with encoding(self.engine) as task:
            batches = self.validation.whole(config.limit)
            return evaluate(task, batches, world.collectives, world.device, config.evaluators())

    def note_best(self, state: TrainState) -> bool:
        """Whether this is the best evaluation so far; every rank comes to the same answer from the same metrics."""
        metric = self.recipe.checkpoint.best
        if metric not in state.metrics:
            # Not worth the run's end: a small evaluation set may hold no pair of views at all.
            self.log.say(f"checkpoint.best={metric!r} is not among the metrics: {', '.join(sorted(state.metrics))}")
            return False
        return checkpoint.note_best(self.run, state.step, metric, state.metrics[metric], self.engine.world.collectives)

    def check_finite(self, step: int, lost: int, done: Step) -> None:
        if lost:
            self.log.say(
                f"step {step}: loss {done.loss}, gradient norm {done.norm}; nothing was changed ({lost} in a row)"
            )
        if lost > self.recipe.max_nonfinite:
            raise FloatingPointError(
                f"step {step}: {lost} steps in a row without a finite loss and gradient (max_nonfinite="
                f"{self.recipe.max_nonfinite}); lower optimizer.lr={self.recipe.optimizer.lr}"
            )

    def figures(self, state: TrainState, done: Step, clock: Clock) -> dict[str, float]:
        """Everything to log about this step, means over ranks; every rank calls it."""
        rates = {f"lr/{i}": float(g["lr"]) for i, g in enumerate(self.engine.optimizer.param_groups)}
        return {
            "loss": done.loss,
            **mean(done.parts, self.engine.world.collectives),
            "log_batch": math.log(self.recipe.batch),  # the loss of knowing nothing
            "lr": max(rates.values()),
            **({} if done.norm is None else {"grad_norm": done.norm}),
            **clock.figures(),
            "samples": state.step * self.recipe.batch,
            "skipped": sum(state.skipped.values()),
        }


class Clock:
    """Samples per second, the share of time spent waiting for data, and milliseconds a step by phase."""

    def __init__(self, batch: int, watch: PhaseTimer):
        self.batch, self.watch, self.begin = batch, watch, time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Since last asked."""
        steps, phases, now = self.watch.count, self.watch.figures(), time.perf_counter()
        took, self.begin = now - self.begin, now
        times = {f"time/{phase}": value for phase, value in phases.items()}
        return {"samples/s": steps * self.batch / took, "data_wait": steps * phases["data"] / 1000 / took, **times}


def mean(parts: Mapping[str, torch.Tensor], collectives: Collectives) -> dict[str, float]:
    """Scalars averaged over ranks, by one message."""
    if not parts:
        return {}
    values = collectives.sum(torch.stack([p.detach().double().reshape(()) for p in parts.values()])) / collectives.size
    return dict(zip(parts, values.tolist()))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGTERM and SIGINT that came, instead of dying of the first; a second SIGINT interrupts as usual."""
    told: list[int] = []

    def note(number: int, _: object) -> None:
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

"""The training loop, for any module that turns a batch into losses: data, step, log, evaluation, checkpoint."""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from mvpretrain.data.loader import BadSamples, Stream, StreamConfig
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.engine import Engine, Step, World, wrap
from mvpretrain.engine.optimizer import OptimizerConfig
from mvpretrain.engine.schedule import ScheduleConfig, set_rate
from mvpretrain.engine.settings import EngineConfig
from mvpretrain.evaluation._settings import EvaluationConfig
from mvpretrain.files import write_text
from mvpretrain.loggers import RunInfo
from mvpretrain.loggers._metrics import MetricsLogger
from mvpretrain.loggers._settings import LogConfig
from mvpretrain.model.phase_timer import PhaseTimer
from mvpretrain.recipe import CheckpointConfig
from mvpretrain.training import checkpoint
from mvpretrain.training.checkpoint import TrainState

PREEMPTED = 75  # exit code of a run that was signalled to stop and saved: start it again with --resume


class Preempted(Exception):
    """SIGTERM or SIGINT arrived; the checkpoint is written."""


class LoopSettings(NamedTuple):
    """What the loop uses of a recipe."""

    run: Path
    seed: int
    batch: int  # global
    steps: int  # of the whole run
    loader: StreamConfig  # how many bad samples are too many
    engine: EngineConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    max_nonfinite: int
    recipe: str  # all settings as YAML, for the run's folder, its checkpoints and loggers


def run_loop(
    world: World,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    settings: LoopSettings,
    resume_from: Path | None = None,
    evaluate: Callable[[Engine], dict[str, float]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Train a module, `forward(batch) -> Losses`, up to `settings.steps`; every rank of `world` calls it.

    `resume_from` is a checkpoint to go on from. `evaluate` gives metrics, the same on every rank. `notes` are sentences
    for the console before the first step.

    ValueError: the module, the batch or the checkpoint do not fit the engine. FloatingPointError: too many steps in a
    row without a finite loss. Preempted: signalled to stop, after saving.
    """
    engine = wrap(world, module, optimizer, settings.engine, settings.batch)
    # Every rank draws other numbers; a rank that the checkpoint knows goes on with the state that is saved there.
    seed_generators(settings.seed + 1 + world.rank)
    state = restored(resume_from, engine) if resume_from else TrainState(0, stream.start(), {}, {})
    if world.rank == 0:
        settings.run.mkdir(parents=True, exist_ok=True)
        write_text(settings.run / "recipe.yaml", settings.recipe)
    info = RunInfo(settings.run, yaml.safe_load(settings.recipe), settings.steps, state.step)
    log = MetricsLogger(settings.log, info, active=world.rank == 0)
    try:
        where = f"{world.kind} on {world.size} process(es), {world.device.type}, {world.precision}"
        log.say(f"# {where}\n{settings.recipe}")
        for note in notes:
            log.say(note)
        if resume_from:
            log.say(f"going on after step {state.step}")
        _Loop(engine, stream, settings, evaluate, log).run(state)
    finally:
        log.close()


def restored(path: Path, engine: Engine) -> TrainState:
    """Engine and train state of a checkpoint, under the rates and decays of now: those may be changed on resuming."""
    chosen = [(g["base_lr"], g["weight_decay"]) for g in engine.optimizer.param_groups]
    state = checkpoint.restore(path, engine)
    for group, (rate, decay) in zip(engine.optimizer.param_groups, chosen):
        group["base_lr"], group["weight_decay"] = rate, decay
    return state


class _Loop:
    """One run's steps: data, step, log, evaluation, checkpoint, in this order, the same on every rank."""

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        settings: LoopSettings,
        evaluate: Callable[[Engine], dict[str, float]] | None,
        log: MetricsLogger,
    ):
        self.engine, self.stream, self.settings, self.evaluate, self.log = engine, stream, settings, evaluate, log

    def run(self, state: TrainState) -> None:
        settings, timer = self.settings, self.engine.phase_timer
        bad = BadSamples(settings.loader.max_bad_share, settings.loader.max_bad_in_row)
        throughput, nonfinite, unconverged = Throughput(settings.batch, timer), 0, Unconverged()
        with stop_signals() as signals:
            batches = self.stream.batches(state.cursor)
            while state.step < settings.steps:
                with timer("data"):
                    batch, cursor, skipped = next(batches)
                set_rate(self.engine.optimizer, settings.schedule.factor(state.step, settings.steps))
                done = self.engine.step(batch, [len(signals), skipped.total()])
                signalled, skipped_anywhere = done.sums
                reasons = skipped + Counter({"on other ranks": round(skipped_anywhere) - skipped.total()})
                bad.add(reasons, settings.batch)
                state = TrainState(state.step + 1, cursor, dict(Counter(state.skipped) + reasons), state.metrics)
                nonfinite = 0 if done.stepped else nonfinite + 1
                self.check_finite(state.step, nonfinite, done)
                unconverged.add(done.parts)
                self.log.step(state.step)
                if state.step % settings.log.every == 0 or state.step == settings.steps:
                    self.log.write(state.step, self.figures(state, done, throughput))
                    for sentence in unconverged.sentences():
                        self.log.say(f"step {state.step}: {sentence}")
                state = self.evaluate_and_save(state, bool(signalled))
                if signalled:
                    raise Preempted(
                        f"signalled to stop after step {state.step} of {settings.steps}; saved, go on with --resume"
                    )

    def evaluate_and_save(self, state: TrainState, signalled: bool) -> TrainState:
        """Evaluation and checkpoint where they are due."""
        settings = self.settings
        last, interval = state.step == settings.steps, settings.evaluation.every
        improved = False
        if self.evaluate and (last or (interval and state.step % interval == 0)):
            metrics = self.evaluate(self.engine)
            self.log.write(state.step, metrics)
            state = state._replace(metrics=metrics)
            improved = self.note_best(state)
        if last or signalled or improved or state.step % settings.checkpoint.every == 0:
            checkpoint.save(settings.run, self.engine, state, settings.recipe, settings.batch, settings.checkpoint.keep)
        return state

    def note_best(self, state: TrainState) -> bool:
        """Whether this is the best evaluation so far; every rank comes to the same answer from the same metrics."""
        metric = self.settings.checkpoint.best
        if metric not in state.metrics:
            # Not worth the run's end: a small evaluation set may hold no pair of views at all.
            self.log.say(f"checkpoint.best={metric!r} is not among the metrics: {', '.join(sorted(state.metrics))}")
            return False
        collectives = self.engine.world.collectives
        return checkpoint.note_best(self.settings.run, state.step, metric, state.metrics[metric], collectives)

    def check_finite(self, step: int, nonfinite: int, done: Step) -> None:
        """FloatingPointError where more steps in a row than allowed had no finite loss and gradient."""
        if nonfinite:
            self.log.say(
                f"step {step}: loss {done.loss}, gradient norm {done.norm}; nothing was changed ({nonfinite} in a row)"
            )
        if nonfinite > self.settings.max_nonfinite:
            raise FloatingPointError(
                f"step {step}: {nonfinite} steps in a row without a finite loss and gradient (max_nonfinite="
                f"{self.settings.max_nonfinite}); lower optimizer.lr={self.settings.optimizer.lr}"
            )

    def figures(self, state: TrainState, done: Step, throughput: Throughput) -> dict[str, float]:
        """Everything to log about this step, means over ranks; every rank calls it."""
        rates = {f"lr/{i}": float(g["lr"]) for i, g in enumerate(self.engine.optimizer.param_groups)}
        return {
            "loss": done.loss,
            **mean(done.parts, self.engine.world.collectives),
            "log_batch": math.log(self.settings.batch),  # the loss of knowing nothing
            "lr": max(rates.values()),
            **({} if done.norm is None else {"grad_norm": done.norm}),
            **throughput.figures(),
            "samples": state.step * self.settings.batch,
            "skipped": sum(state.skipped.values()),
        }


class Throughput:
    """Samples per second, the part of the time that was waiting for data, and milliseconds a step by phase."""

    def __init__(self, batch: int, timer: PhaseTimer):
        self.batch, self.timer, self.begin = batch, timer, time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Since the last call."""
        steps, phases, now = self.timer.count, self.timer.figures(), time.perf_counter()
        took, self.begin = now - self.begin, now
        times = {f"time/{phase}": value for phase, value in phases.items()}
        return {"samples/s": steps * self.batch / took, "data_wait": steps * phases["data"] / 1000 / took, **times}


class Unconverged:
    """Counts the steps in which a solver inside the objective ended short of its tolerance.

    Those are the parts called `unconverged`, 1 where it did; they are read when the step is logged, not before.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, parts: Mapping[str, torch.Tensor]) -> None:
        self.steps += 1
        for name, part in parts.items():
            if name.rpartition("/")[2] == "unconverged":
                self.counts[name] = self.counts[name] + part if name in self.counts else part

    def sentences(self) -> list[str]:
        """One for each solver that did not converge since the last call."""
        counts = {name.rpartition("/")[0]: int(count) for name, count in self.counts.items()}
        found = [
            f"the solver of {name or 'the objective'} ended short of its tolerance in {count} of the last {self.steps} "
            "step(s), by as much as gradient_error says; raise objective.max_steps, or the temperature"
            for name, count in counts.items()
            if count
        ]
        self.steps, self.counts = 0, {}
        return found


def mean(parts: Mapping[str, torch.Tensor], collectives: Collectives) -> dict[str, float]:
    """Scalars averaged over ranks, by one message."""
    if not parts:
        return {}
    values = collectives.sum(torch.stack([p.detach().double().reshape(()) for p in parts.values()])) / collectives.size
    return dict(zip(parts, values.tolist()))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGTERM and SIGINT received so far, instead of dying of the first; a second SIGINT interrupts as usual."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_generators(seed: int) -> None:
    """Seed torch's, numpy's and Python's generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

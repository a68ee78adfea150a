"""Checkpoints as folders: written aside, renamed when whole, found again, pruned."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from mvpretrain.data.loader import Cursor
from mvpretrain.distributed import sample_state
from mvpretrain.distributed.collectives import Collectives
from mvpretrain.engine import Engine
from mvpretrain.files import FORMATS, check_format, move_into_place, write_text


class TrainState(NamedTuple):
    """Where a run is: enough, with the engine's state, to go on as if nothing had happened."""

    step: int
    cursor: Cursor
    skipped: dict[str, int]  # samples that could not be used so far, by reason
    metrics: dict[str, float]  # of the last evaluation


def folder(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def saved(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder(run).glob("step-????????") if (p / "meta.json").is_file())


def find(run: Path, which: str = "last") -> Path:
    """One checkpoint: `last`, `best`, or a step's number. ValueError: not there, with those that are."""
    known = saved(run)
    if not known:
        raise ValueError(f"{run} holds no checkpoint; train it first with `mvpretrain train {run}`")
    if which == "last":
        return known[-1]
    name = best(run) if which == "best" else f"step-{int(which):08d}" if which.isdigit() else which
    for path in known:
        if path.name == name:
            return path
    raise ValueError(f"{run} has no checkpoint {which!r}; it has {', '.join(p.name for p in known)}, last and best")


def best(run: Path) -> str | None:
    """The name of the checkpoint with the best evaluation, None before the first one."""
    record = _best(run)
    return record["checkpoint"] if record else None


def save(run: Path, engine: Engine, state: TrainState, recipe: str, batch: int, keep: int) -> Path:
    """Write the checkpoint of this step; every rank calls it. It appears under its name only when it is whole.

    `recipe` are the run's settings as YAML, `batch` is the global one. Of the checkpoints, the last `keep` stay, and
    the best one.
    """
    rank, collectives = engine.world.rank, engine.world.collectives
    final = folder(run) / f"step-{state.step:08d}"
    partial = final.with_name("." + final.name)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    collectives.largest(0)  # a barrier: nobody writes before the folder is there
    engine.save(partial)
    sample_state.save(engine.task, partial, rank)
    torch.save(_generators(), partial / f"rank-{rank}.pt")
    weights = engine.weights()
    if rank == 0:
        save_file(weights, partial / "weights.safetensors")
        (partial / "recipe.yaml").write_text(recipe)
        world = {"size": engine.world.size, "kind": engine.world.kind, "batch": batch}
        meta = {"format": FORMATS["checkpoint"], **world, **state._asdict()}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    collectives.largest(0)  # and nobody renames before everyone has written
    if rank == 0:
        move_into_place(partial, final)
        _prune(run, keep)
    collectives.largest(0)
    return final


def restore(path: Path, engine: Engine) -> TrainState:
    """Put the engine's state and the generators back, and return the train state; every rank calls it.

    ValueError: a state that this engine or its task cannot take over.
    """
    world = engine.world
    meta = refuse_other_world(path, world.kind, world.size)
    engine.restore(path)
    sample_state.restore(engine.task, path)
    generators = path / f"rank-{world.rank}.pt"
    if generators.is_file():  # a checkpoint of fewer ranks has none for this one
        _set_generators(generators)
    return TrainState(
        meta["step"], Cursor(meta["cursor"][0], tuple(meta["cursor"][1])), meta["skipped"], meta["metrics"]
    )


def refuse_other_world(path: Path, kind: str, size: int) -> dict[str, Any]:
    """What the checkpoint says of itself.

    ValueError: it is of another format, or ZeRO's parts were written by other ranks or another stage.
    """
    meta = json.loads((path / "meta.json").read_text())
    check_format("checkpoint", meta.get("format"), path)
    if kind.startswith("zero") and (meta["size"] != size or meta["kind"] != kind):
        raise ValueError(
            f"{path} was written by {meta['size']} ranks under {meta['kind']}, this run has {size} under "
            f"{kind}; start it as it was, or begin a new run from {path / 'weights.safetensors'} (init=...)"
        )
    return meta


def refuse_pickles(path: Path, kind: str, recipe: str | None) -> None:
    """ValueError where resuming under ZeRO would run code of anyone: DeepSpeed unpickles its own files.

    They are read if the checkpoint was made by `recipe`, the trusted settings of this run as YAML; never if it is None.
    """
    if not kind.startswith("zero"):
        return
    stored = path / "recipe.yaml"
    made_by = yaml.safe_load(stored.read_text()) if stored.is_file() else {}
    changed = ["it"] if recipe is None else list(different_keys(made_by, yaml.safe_load(recipe)))
    if not changed:
        return
    why = "this recipe was read from a folder" if recipe is None else f"its recipe differs in {', '.join(changed[:5])}"
    raise ValueError(
        f"{path} holds DeepSpeed's own files, which run code when they are read, and {why}; if you made them, add "
        f"--trust (in Python trust=True), or begin a new run from {path / 'weights.safetensors'} (init=...)"
    )


def different_keys(one: Any, other: Any, above: str = "") -> Iterator[str]:
    """The dotted keys at which two nested mappings differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from different_keys(one.get(key), other.get(key), f"{above}.{key}" if above else str(key))
    elif one != other:
        yield above


def note_best(run: Path, step: int, metric: str, value: float, collectives: Collectives) -> bool:
    """Write down this step as the best one if it is; every rank calls it and gets rank 0's answer."""
    better = False
    if collectives.rank == 0:
        record = _best(run)
        better = record is None or value > record["value"]
    better = bool(collectives.largest(int(better)))
    if better and collectives.rank == 0:
        folder(run).mkdir(parents=True, exist_ok=True)
        content = {"checkpoint": f"step-{step:08d}", "metric": metric, "value": value}
        write_text(folder(run) / "best.json", json.dumps(content))
    return better


def _best(run: Path) -> dict[str, Any] | None:
    """The record of the best evaluation; None also where a run was killed before it had saved that step."""
    path = folder(run) / "best.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    return record if record and (folder(run) / record["checkpoint"] / "meta.json").is_file() else None


def _prune(run: Path, keep: int) -> None:
    for old in saved(run)[:-keep]:
        if old.name != best(run):
            shutil.rmtree(old)


def _generators() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_generators(path: Path) -> None:
    """Put the states of `_generators` back. ValueError: the file holds anything else, of which nothing is run."""
    numbers = np.zeros(1, np.uint32)
    # numpy's state holds such an array, which torch does not unpickle unless these are named.
    names = [np.ndarray, np.dtype, type(numbers.dtype), numbers.__reduce__()[0]]
    try:
        with torch.serialization.safe_globals(names):
            state = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than the states of random generators; remove it to draw afresh") from error
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])

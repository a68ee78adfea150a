"""What the launcher says against what the recipe asks: every contradiction is refused in words, before any group."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.engine import resolve, start, wrap
from mvpretrain.engine.settings import EngineConfig
from tests.engine.small import ROWS, engine_of, task_of

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch):
    """`launched(size, rank, **others)` sets the environment as a launcher would."""
    for name in (*LAUNCHERS, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def by(size: int = 1, rank: int = 0, **others: str) -> None:
        ranks = {} if size == 1 else {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for name, value in {**ranks, **others}.items():
            monkeypatch.setenv(name, value)

    return by


def engine(**settings) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", **settings})


@pytest.mark.parametrize(("size", "kind"), [(1, "none"), (2, "ddp"), (4, "ddp")])
def test_auto_is_settled_by_the_number_of_processes(launched, size, kind):
    launched(size, rank=size - 1)
    assert resolve(engine())[:5] == (kind, "fp32", torch.device("cpu"), size - 1, size)


@pytest.mark.parametrize("kind", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_every_other_kind_takes_one_process_or_several(launched, kind):
    launched()
    assert resolve(engine(kind=kind)).kind == kind
    launched(2)
    assert resolve(engine(kind=kind, precision="bf16", ranks=2))[:2] == (kind, "bf16")


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
REFUSED = {
    "kind none with two processes": (2, {"kind": "none"}, {}, ["kind=none", "started 2", "engine.kind=ddp or zero2"]),
    "fewer processes than asked for": (1, {"ranks": 2}, {}, ["ranks=2", "started 1", "--nproc-per-node 2", "ranks=1"]),
    "more processes than asked for": (4, {"ranks": 2}, {}, ["ranks=2", "started 4", "engine.ranks=4"]),
    "no GPU": (1, {"device": "cuda"}, {}, ["engine.device=cuda", "no GPU", "engine.device=cpu"]),
    "fp16 on a CPU": (1, {"precision": "fp16"}, {}, ["precision=fp16", "needs a GPU", "bf16 or fp32"]),
    "offload without ZeRO": (2, {"offload": True}, {}, ["engine.offload", "kind=ddp", "zero1 to zero3"]),
    "offload without partitions": (2, {"offload": True, "kind": "zero0"}, {}, ["engine.offload", "kind=zero0"]),
    "options without DeepSpeed": (1, {"options": {"x": 1}}, {}, ["engine.options", "kind=none", "zero0 to zero3"]),
    "FSDP": (2, {}, {"ACCELERATE_USE_FSDP": "true"}, ["FSDP", "--multi_gpu or --use_deepspeed"]),
    "DeepSpeed against DDP": (2, {}, DEEPSPEED, ["ZeRO-2", "engine.kind=ddp", "set engine.kind=zero2"]),
    "DeepSpeed of another stage": (2, {"kind": "zero3"}, DEEPSPEED, ["ZeRO-2", "kind=zero3", "set engine.kind=zero2"]),
    "DeepSpeed of no stage": (
        2,
        {"kind": "ddp"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        ["DeepSpeed", "engine.kind=ddp", "set engine.kind=zero2"],
    ),
    "another precision": (2, {}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["for bf16", "precision=fp32"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_words(launched, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    size, settings, environment, words = REFUSED[name]
    launched(size, **environment)
    with pytest.raises(ValueError) as refusal:
        resolve(engine(**settings))
    assert all(word in str(refusal.value) for word in words) and "None" not in str(refusal.value), refusal.value


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"kind": "zero2"}, DEEPSPEED),
        ({"kind": "zero1"}, {"ACCELERATE_USE_DEEPSPEED": "true"}),
        ({"precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ({"precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "no"}),  # the launcher's default is no wish
        ({}, {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}),
    ],
)
def test_a_launcher_that_agrees_is_let_through(launched, settings, environment):
    launched(2, **environment)
    resolve(engine(**settings))


def test_start_counts_the_threads_of_the_machine_among_its_ranks(launched, monkeypatch):
    launched(OMP_NUM_THREADS="1")
    before = torch.get_num_threads()
    try:
        assert start(resolve(engine(threads=2))).size == 1 and torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        start(resolve(engine()))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def announced(rank: int) -> str:
    """A launcher that announces more processes than have come."""
    import os

    os.environ["WORLD_SIZE"] = "3"
    try:
        start(resolve(engine(kind="ddp")))
    except ValueError as error:
        return str(error)
    finally:
        os.environ["WORLD_SIZE"] = "2"
    return ""


def test_fewer_processes_than_announced(ranks):
    for text in ranks(2).run(announced):
        assert "3 processes were announced, 2 are in the process group" in text


def uneven(rank: int, batch: int) -> str:
    world = start(resolve(engine(kind="ddp")))
    task = task_of(2, torch.float32, world.collectives)
    try:
        wrap(world, task, torch.optim.SGD(task.parameters()), engine(kind="ddp"), batch=batch)
    except ValueError as error:
        return str(error)
    return ""


def test_a_batch_that_does_not_divide(ranks):
    for text in ranks(2).run(uneven, ROWS + 1):
        assert f"batch={ROWS + 1} does not divide over 2 ranks; make it a multiple of 2" in text


def scalar(rank: int) -> str:
    def task(collectives):
        made = task_of(2, torch.float32, collectives)
        made.towers["t0"].register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
        return made

    try:
        engine_of("zero2", task)
    except ValueError as error:
        return str(error)
    return ""


def test_a_parameter_that_deepspeed_cannot_hold(ranks):
    for text in ranks(2).run(scalar):
        assert "'towers.t0.scale' has no dimension" in text and "shape [1]" in text

from __future__ import annotations

import gc
import io
import pickle
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mvpretrain.data.loader import BadSamples, Cursor, Stream, StreamConfig, end_by_parent_alone
from mvpretrain.data.sources.shards import ShardsConfig, Tars, Weighted
from mvpretrain.shards.index import Index
from mvpretrain.types import Batch, View
from mvpretrain.views import ViewConfig
from tests.shards.samples import samples_of, write_shards


class Noisy:
    """A number plus augmentation noise, and the number of bytes as a mask."""

    def __call__(self, raw: bytes) -> View:
        if raw == b"bad":
            raise RuntimeError(f"cannot decode 17 bytes at {id(raw):#x}")
        return View(len(raw) + torch.rand(3), torch.arange(5) < len(raw))

    def blank(self) -> View:
        return View(torch.zeros(3), torch.ones(5, dtype=torch.bool))


class Pixels:
    def __call__(self, raw: bytes) -> View:
        image = Image.open(io.BytesIO(raw))
        return View(torch.tensor(list(image.tobytes()), dtype=torch.uint8))

    def blank(self) -> View:
        return View(torch.zeros(12, dtype=torch.uint8))


NOISY = {"a": (("bin",), Noisy()), "b": (("wav", "bin"), Noisy()), "text": (("txt",), Noisy())}


def tars_of(folder: Path, samples: list[Any], shards: int = 1, name: str = "s") -> Tars:
    return Tars(Index.scan(write_shards(folder, samples, shards, name)), name, label="cls")


def stream_of(sources: list[Any], batch: int = 8, seed: int = 0, rank: int = 0, size: int = 1, **config: Any) -> Stream:
    settings = StreamConfig.model_validate({"workers": 0, "shuffle": 10} | config)
    return Stream(sources, NOISY, batch, seed, settings, rank, size)


def taken(streams: list[Stream], steps: int, cursor: Cursor | None = None) -> tuple[list[Batch], Cursor]:
    """The next global batches from the streams of all ranks, and where they end."""
    start = cursor or streams[0].start()
    ranks = [list(islice(s.batches(start), steps)) for s in streams]
    assert len({after for rank in ranks for _, after, _ in rank[-1:]}) == 1
    return [Batch.cat([batch for batch, _, _ in step]) for step in zip(*ranks)], ranks[0][-1][1]


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    return [tensor for v in values for tensor in flat(v)]


def same(one: Any, two: Any) -> bool:
    return len(flat(one)) == len(flat(two)) > 0 and all(torch.equal(a, b) for a, b in zip(flat(one), flat(two)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 3, 7])
def test_batches_do_not_depend_on_ranks_and_workers(tmp_path: Path, shards: int, size: int, workers: int) -> None:
    tars = tars_of(tmp_path, samples_of(40), shards)
    expected, end = taken([stream_of([tars])], 10)
    found, after = taken([stream_of([tars], rank=r, size=size, workers=workers) for r in range(size)], 10)
    assert same(found, expected) and after == end == Cursor(10, (80,))
    assert all(len(batch.ids) == 8 for batch in found)
    epochs = torch.cat([batch.ids for batch in found]).reshape(2, 40)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(tars.ids.tolist())
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_straddle_epochs_and_may_exceed_them(tmp_path: Path) -> None:
    found, end = taken([stream_of([tars_of(tmp_path, samples_of(5), 2)], batch=12)], 5)
    ids = torch.cat([batch.ids for batch in found])
    assert end == Cursor(5, (60,)) and (ids.unique(return_counts=True)[1] == 12).all()


@pytest.mark.parametrize("size, workers", [(1, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("replacement", [False, True])
def test_resumes_anywhere_with_any_ranks(tmp_path: Path, size: int, workers: int, replacement: bool) -> None:
    tars = tars_of(tmp_path, samples_of(50), 4)
    whole, end = taken([stream_of([tars], replacement=replacement)], 12)
    _, middle = taken([stream_of([tars], replacement=replacement)], 5)
    again = [stream_of([tars], rank=r, size=size, workers=workers, replacement=replacement) for r in range(size)]
    rest, after = taken(again, 7, middle)
    assert same(rest, whole[5:]) and after == end


def test_one_seed_is_one_order(tmp_path: Path) -> None:
    tars = tars_of(tmp_path, samples_of(50), 4)
    one, two, other = (taken([stream_of([tars], seed=seed)], 5)[0] for seed in (1, 1, 2))
    assert same(one, two) and not torch.equal(one[0].ids, other[0].ids)


def test_rows_carry_views_masks_labels_and_absence(tmp_path: Path) -> None:
    tars = tars_of(tmp_path, samples_of(20), 2)
    (batch,), _ = taken([stream_of([tars], batch=20, shuffle=0)], 1)
    sizes = torch.tensor([i * 37 % 1500 for i in range(20)])
    assert torch.equal(batch.views["a"].data.floor().long(), sizes[:, None].expand(20, 3))
    assert batch.labels.tolist() == [i % 7 for i in range(20)] and batch.ids.tolist() == tars.ids.tolist()
    assert batch.present["text"].tolist() == [i % 2 == 1 for i in range(20)] and batch.present["a"].all()
    text = batch.views["text"]
    assert text.mask is not None and text.mask[0].all() and (text.data[::2] == 0).all()
    # Two views of one field, and one view of a sample in another epoch, are augmented differently.
    assert not (batch.views["a"].data == batch.views["b"].data).any()
    (again,), _ = taken([stream_of([tars], batch=20, shuffle=0)], 1, Cursor(1, (20,)))
    assert not (again.views["a"].data == batch.views["a"].data).any()


def test_training_keeps_its_own_random_numbers(tmp_path: Path) -> None:
    tars = tars_of(tmp_path, samples_of(20))
    for workers in (0, 1):
        torch.manual_seed(0)
        taken([stream_of([tars], workers=workers)], 2)
        after = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_weighted_sources_resume_and_keep_their_shares(tmp_path: Path, mode: str) -> None:
    big, small = samples_of(60), samples_of(10, 60)
    one = Weighted(urls=tuple(write_shards(tmp_path, big, 2, "big")), weight=1)
    two = Weighted(urls=tuple(write_shards(tmp_path, small, 1, "small")), weight=3)
    sources = ShardsConfig(train=(one, two)).build({"a": ViewConfig(kind="x", field="bin")}, train=True)
    whole, end = taken([stream_of(sources, batch=16, mix=mode)], 40)
    known = set(sources[0].ids.tolist())
    ours = torch.tensor([[i in known for i in batch.ids.tolist()] for batch in whole])
    assert abs(ours.float().mean() - 0.25) < (0.25 if mode == "batch" else 0.06)
    assert (ours == ours[:, :1]).all() if mode == "batch" else not (ours == ours[:, :1]).all(dim=1).any()
    assert end == Cursor(40, (int(ours.sum()), int((~ours).sum())))
    drawn = torch.cat([batch.ids for batch in whole])[~ours.flatten()]
    assert (drawn[: len(drawn) // 10 * 10].unique(return_counts=True)[1] == len(drawn) // 10).all()
    _, middle = taken([stream_of(sources, batch=16, mix=mode)], 15)
    again = [stream_of(sources, batch=16, mix=mode, rank=r, size=2) for r in range(2)]
    assert same(taken(again, 25, middle)[0], whole[15:])


def png(size: tuple[int, int] = (2, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_absent_rows_and_counted(tmp_path: Path, workers: int) -> None:
    rows: list[dict[str, Any]] = [{"__key__": f"k{i}", "png": png(), "bin": b"12", "cls": b"1"} for i in range(12)]
    rows[3]["png"] = b"no image"
    rows[5]["png"] = png((2, 3))
    rows[7]["bin"] = b"bad"
    tars = tars_of(tmp_path, rows)
    path = Path(tars.url(0))
    path.write_bytes(path.read_bytes()[: int(tars.index.table[11, tars.index.offset("png")]) + 5])
    transforms = {"image": (("png",), Pixels()), "x": (("bin",), Noisy())}
    stream = Stream([tars], transforms, 12, 0, StreamConfig(workers=workers, shuffle=0))
    batch, _, skipped = next(stream.batches(stream.start()))
    bad = [3, 5, 7, 11]
    assert [i for i in range(12) if not batch.present["image"][i]] == bad
    assert torch.equal(batch.present["image"], batch.present["x"]) and batch.ids.tolist() == tars.ids.tolist()
    assert (batch.views["image"].data[bad] == 0).all() and (batch.views["x"].data[bad] == 0).all()
    assert skipped == Counter(
        {
            "image: UnidentifiedImageError: cannot identify image file <_io.BytesIO object at #>": 1,
            "image: uint8 [18] where the blank item is uint8 [12]": 1,
            "x: RuntimeError: cannot decode # bytes at #": 1,
            f"truncated {path}": 1,
        }
    )


class Broken(Tars):
    def read(self, i: int) -> Any:
        raise LookupError("a fault of the program")


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_faults_surface_and_end_the_workers(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    source = Broken(Index.scan(write_shards(tmp_path, samples_of(4))))
    before = set(active_children())  # the session's ranks, where there are any
    with pytest.raises(LookupError, match="a fault of the program"):
        next(stream_of([source], batch=2, workers=workers).batches(Cursor(0, (0,))))
    gc.collect()
    left = set(active_children()) - before
    for worker in left:
        worker.join(10)
    assert not any(worker.is_alive() for worker in left)


def sleep(ready: Any) -> None:
    end_by_parent_alone(0)
    ready.set()
    time.sleep(30)


def test_only_the_training_process_ends_a_worker() -> None:
    fork = get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=sleep, args=(ready,))
    worker.start()
    assert ready.wait(10) and worker.pid
    for name in ("-TERM", "-INT"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_too_many_bad_samples_stop_the_run() -> None:
    limit = BadSamples(max_share=0.02, max_in_row=100)
    for _ in range(9):
        limit.add(Counter({"image: X": 2}), 20)  # not judged before 200 samples
    message = r"21 of 200 samples could not be used: image: X 20, truncated 1; max_bad_share is 2.00%; .*shards check"
    with pytest.raises(ValueError, match=message):
        limit.add(Counter({"image: X": 2, "truncated": 1}), 20)
    limit = BadSamples(max_share=1, max_in_row=100)
    for reasons in (60, 59, 60):
        limit.add(Counter(x=reasons), 60)
    with pytest.raises(ValueError, match="max_bad_in_row is 100, the last 120 were all bad"):
        limit.add(Counter(x=60), 60)
    limit = BadSamples(max_share=0.02, max_in_row=100)
    for _ in range(100):
        limit.add(Counter(x=1), 50)
    assert limit.rows == 5000 and limit.reasons == Counter(x=100)


@pytest.mark.parametrize("size, workers, limit", [(1, 0, None), (2, 1, None), (4, 0, 13), (1, 0, 99)])
def test_whole_is_every_sample_once_in_equal_batches(tmp_path: Path, size: int, workers: int, limit: int) -> None:
    sources = [tars_of(tmp_path, samples_of(11), 3), tars_of(tmp_path, samples_of(10, 11), 1, "t")]
    streams = [stream_of(sources, rank=r, size=size, workers=workers) for r in range(size)]
    ranks = [list(s.whole(limit)) for s in streams]
    found = Batch.cat([Batch.cat(list(step)) for step in zip(*ranks)])
    assert {len(b.ids) for rank in ranks for b in rank} == {8 // size} and len({len(rank) for rank in ranks}) == 1
    every = [i for s in sources for i in s.ids.tolist()]
    count = min(limit or 21, 21)
    assert found.ids[:count].tolist() == [every[k * 21 // count] for k in range(count)]
    assert (
        len(found.ids) == -(-count // 8) * 8 and (found.ids[count:] == -1).all() and (found.labels[count:] == -1).all()
    )
    assert not found.present["a"][count:].any() and found.present["a"][:count].all()


def test_workers_need_no_fork(tmp_path: Path) -> None:
    tars = tars_of(tmp_path, samples_of(20))
    stream = stream_of([tars])
    draws = next(stream.plan(Cursor(3, (24,))))
    assert same(pickle.loads(pickle.dumps(stream.reader))[draws], stream.reader[draws])


def test_impossible_batches_are_refused(tmp_path: Path) -> None:
    tars = tars_of(tmp_path, samples_of(4))
    for batch, size in [(7, 2), (1, 1), (2, 4)]:
        with pytest.raises(ValueError, match=f"batch is {batch} on {size} ranks"):
            stream_of([tars], batch=batch, size=size)
    with pytest.raises(ValueError, match="seed is -1"):
        stream_of([tars], seed=-1)
    with pytest.raises(ValueError, match="limit of evaluated samples is 0"):
        next(stream_of([tars]).whole(0))

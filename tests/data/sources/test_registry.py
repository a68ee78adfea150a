"""What holds for every kind of data source, found by walking the registry, and for a user's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvpretrain import recipe
from mvpretrain.data.build import build_stream, count_samples, describe_damages
from mvpretrain.data.loader import StreamConfig
from mvpretrain.data.sources import SourceConfig, registry
from mvpretrain.shards.pack import array_bytes
from mvpretrain.types import Sample, Source
from mvpretrain.views.vector import VectorConfig
from tests.shards.samples import write_shards

VIEWS = {"x": VectorConfig(field="x.npy", dim=3), "y": VectorConfig(field="y.npy", dim=3)}


class Own:
    """A user's source as `types.Source` asks for it."""

    name, weight = "own", 1.0

    def __init__(self, length: int, train: bool):
        self.counts = np.array([length if train else length // 2])
        self.ids = np.arange(length)

    def read(self, i: int) -> Sample:
        return Sample(i, f"{i}", {"x.npy": np.full(3, i), "y.npy": np.full(3, -i)})

    def damages(self) -> list[str]:
        return ["the sky is falling"]


class WithoutHeldOut(Own):
    def __init__(self, length: int):
        super().__init__(length, True)


class Nameless:
    counts = np.array([1])


class OwnConfig(SourceConfig):
    """Settings of one's own."""

    kind: str = "tests.data.sources.test_registry:OwnConfig"
    length: int = 4

    def build(self, views: Any, train: bool) -> list[Own]:
        return [Own(self.length, train)]


OWN = f"{__name__}:Own"


@pytest.fixture(params=[*registry.kinds(), OWN])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    rows = [
        {"__key__": f"k{i}", "x.npy": array_bytes(np.full(3, i)), "y.npy": array_bytes(np.full(3, -i))}
        for i in range(6)
    ]
    known = {
        "shards": lambda: {"train": write_shards(tmp_path, rows, 2), "eval": write_shards(tmp_path, rows[:3], 1, "e")},
        "synthetic": lambda: {"samples": 6, "eval_samples": 3},
        OWN: lambda: {"length": 6},
    }
    return {"kind": request.param, **known[request.param]()}


def test_samples_are_read_in_any_order_in_any_process(settings):
    config = registry.parse(settings)
    for train, count in ((True, 6), (False, 3)):
        (source,) = config.build(VIEWS, train=train)
        assert isinstance(source, Source) and count_samples([source]) == count
        other = pickle.loads(pickle.dumps(source))
        for i in (count - 1, 0, 1):
            one, two = source.read(i), other.read(i)
            assert one.id == two.id == source.ids[i] and one.fields.keys() >= {"x.npy", "y.npy"}
            assert repr(one) == repr(two)


def test_settings_round_trip_and_refuse_unknown_keys(settings):
    config = registry.parse(settings)
    assert registry.parse(config.model_dump(mode="json")) == config
    if ":" not in config.kind:
        with pytest.raises(ValueError, match="unknown key 'evil'; "):
            registry.parse(settings | {"evil": 1})


def parsed(data: dict[str, Any]) -> recipe.Recipe:
    views = {name: view.model_dump(mode="json") for name, view in VIEWS.items()}
    towers = {name: {"encoder": {"kind": "mlp", "input": 3, "width": 8}} for name in VIEWS}
    rest = {"objective": {"kind": "infonce"}, "batch": 4, "steps": 2, "loader": {"workers": 0}}
    return recipe.parse({"run": "r", "data": data, "views": views, "towers": towers, **rest})


def test_a_recipe_takes_any_kind(settings):
    found = parsed(settings)
    assert recipe.parse(found.model_dump(mode="json")) == found
    stream = found.stream("train")
    assert stream is not None
    batch, _, skipped = next(stream.batches(stream.start()))
    assert batch.present["x"].all() and batch.views["y"].data.shape == (4, 3) and not skipped


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "shrads"}, "data: unknown data source kind 'shrads'; did you mean 'shards'"),
        ({"samples": 3}, "data: data source settings are a mapping with a 'kind', one of .*synthetic"),
        ({"kind": "synthetic", "sampels": 3}, "data: unknown key 'sampels'; did you mean 'samples'"),
        ({"kind": "shards", "train": []}, "data: train and eval need at least one url"),
        ({"kind": "nowhere:Thing"}, "data: data source kind 'nowhere:Thing' cannot be loaded"),
    ],
)
def test_mistakes_are_sentences(data, message):
    with pytest.raises(ValueError, match=message):
        parsed(data)


def test_scoring_by_class_needs_a_label():
    base = parsed({"kind": "shards", "train": "a.tar"}).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"evaluation.by_label .* as data.label"):
        recipe.parse(base | {"evaluation": {"by_label": ["x"]}})
    labelled = base | {"data": base["data"] | {"label": "cls"}, "evaluation": {"by_label": ["x"]}}
    assert recipe.parse(labelled).data.labelled


def test_a_users_own_source():
    assert registry.parse({"kind": f"{__name__}:OwnConfig", "length": 2}).build(VIEWS, True)[0].counts.tolist() == [2]
    lone = registry.parse({"kind": f"{__name__}:WithoutHeldOut", "length": 2})
    assert len(lone.build(VIEWS, train=True)) == 1 and lone.build(VIEWS, train=False) == []
    assert registry.parse({"kind": OWN, "length": 1}).build(VIEWS, train=False) == []
    with pytest.raises(ValueError, match="Nameless' lacks name, weight, ids, read; "):
        registry.parse({"kind": f"{__name__}:Nameless"}).build(VIEWS, train=True)
    assert describe_damages([Own(2, True)]) == ["the sky is falling"]


def test_a_stream_of_chosen_transforms():
    data = registry.parse({"kind": OWN, "length": 6})
    transforms = {"x": (("x.npy",), VIEWS["x"].build(train=False))}
    settings = StreamConfig(workers=0)
    stream = build_stream(data, VIEWS, "eval", 2, 0, settings, transforms=transforms)
    assert stream is not None and [list(batch.views) for batch in stream.whole()] == [["x"], ["x"]]
    assert [batch.ids.tolist() for batch, _ in stream.once(np.array([2, 0, 1]))] == [[2, 0], [1, -1]]
    lone = registry.parse({"kind": f"{__name__}:WithoutHeldOut", "length": 2})
    assert build_stream(lone, VIEWS, "eval", 2, 0, settings) is None

"""Towers, heads and objective as one module."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from mvpretrain.distributed.collectives import SingleProcess
from mvpretrain.model.heads import HeadConfig, head, projection, unit
from mvpretrain.model.task import EmbeddingGradients, Task
from mvpretrain.model.tower import Tower, TowerConfig
from mvpretrain.types import Batch, Losses, View
from tests.engine.small import DIM, ROWS, WIDTH, batch_of, task_of, tower


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_have_their_layers_widths_and_norms(layers, norm):
    made = head(6, 4, HeadConfig(layers=layers, width=7, norm=norm))
    linear = [m for m in made.modules() if isinstance(m, nn.Linear)]
    sizes = [6] + [7] * (layers - 1) + [4]
    assert [(m.in_features, m.out_features) for m in linear] == list(itertools.pairwise(sizes))
    kind = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm]
    assert sum(isinstance(m, kind) for m in made.modules()) == layers - 1
    assert linear[-1].bias is None and made(torch.randn(5, 6)).shape == (5, 4)


def test_no_head_hands_the_encoder_through_and_must_fit():
    x = torch.randn(3, 6)
    assert head(6, 6, HeadConfig(layers=0))(x) is x
    with pytest.raises(ValueError, match="equal to the encoder's 6, got dim=4; set dim=6"):
        head(6, 4, HeadConfig(layers=0))


def test_several_heads_stand_side_by_side_each_with_its_own_weights():
    made, x = projection(6, 4, HeadConfig(layers=2, norm="batch"), heads=3).eval(), torch.randn(5, 6)
    each = list(made.each)  # type: ignore[arg-type]
    assert [sum(p.numel() for p in one.parameters()) for one in each] == [6 * 7 + 2 * 6 + 6 * 4] * 3
    torch.testing.assert_close(made(x), torch.cat([one(x) for one in each], dim=1))
    assert not torch.equal(each[0](x), each[1](x))
    assert projection(6, 12, HeadConfig(), heads=1).state_dict().keys() == head(6, 12, HeadConfig()).state_dict().keys()


def test_a_product_of_rows_is_the_mean_of_their_heads_cosines():
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    cosines = [nn.functional.cosine_similarity(x[:, c : c + 2], y[:, c : c + 2]) for c in (0, 2, 4)]
    torch.testing.assert_close((unit(x, 3) * unit(y, 3)).sum(dim=1), torch.stack(cosines).mean(dim=0))
    torch.testing.assert_close(unit(x, 3).norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(unit(x, 1), nn.functional.normalize(x, dim=1)) and unit(x.bfloat16(), 3).dtype == torch.float32


def test_a_task_of_several_heads_encodes_them_as_such():
    task = Task({"v0": "t", "v1": "t"}, {"t": tower()}, 2, Bare(), SingleProcess(), heads=3)  # type: ignore[arg-type]
    for z in task.encode(batch_of(2)).z.values():
        torch.testing.assert_close(z.unflatten(1, (3, 2)).norm(dim=2), torch.full((ROWS, 3), 3**-0.5))


def test_several_heads_without_weights_are_refused():
    with pytest.raises(ValueError, match="a head of 0 layers has no weights, and the objective asks for heads=2"):
        Tower(tower(head=HeadConfig(layers=0)), 8, heads=2)


class Counting(nn.Module):
    """An encoder that notes how many rows each call brings."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.dim, self.calls = dim, []
        self.linear = nn.Linear(WIDTH, dim)

    def forward(self, view: View) -> torch.Tensor:
        self.calls.append(len(view.data))
        x = view.data if view.mask is None else view.data.masked_fill(~view.mask, 0)
        return self.linear(x)


def counting(views: dict[str, str]) -> Task:
    encoder: Any = {"kind": f"{__name__}:Counting"}
    towers = {name: TowerConfig(encoder=encoder) for name in sorted(set(views.values()))}
    return Task(views, towers, DIM, lambda local, gathered: Losses(local.z["v0"].sum(), {}), SingleProcess())  # type: ignore[arg-type]


def test_views_of_one_tower_go_through_it_in_one_call_and_come_out_as_their_own():
    task, batch = counting({"v0": "one", "v1": "other", "v2": "one"}), batch_of(3)
    z = task.encode(batch).z
    one, other = task.towers["one"], task.towers["other"]
    assert one.encoder.calls == [2 * ROWS] and other.encoder.calls == [ROWS]  # type: ignore[union-attr]
    assert list(z) == ["v0", "v1", "v2"]
    for view, module in (("v0", one), ("v1", other), ("v2", one)):
        alone = nn.functional.normalize(module(batch.views[view]), dim=1)
        torch.testing.assert_close(z[view], alone, rtol=0, atol=1e-6)


def test_views_of_one_tower_but_other_shapes_or_masks_go_apart():
    task, batch = counting({"v0": "one", "v1": "one", "v2": "one"}), batch_of(3)
    mask = torch.rand(ROWS, WIDTH) > 0.5
    batch.views["v1"] = batch.views["v1"]._replace(mask=mask)
    z = task.encode(batch).z
    assert task.towers["one"].encoder.calls == [2 * ROWS, ROWS]  # type: ignore[union-attr]
    batch.views["v1"] = View(batch.views["v1"].data * mask)
    torch.testing.assert_close(z, task.encode(batch).z, rtol=0, atol=1e-6)
    batch.views.update({v: View(batch.views[v].data, mask) for v in ("v0", "v1", "v2")})
    together = task.encode(batch).z
    batch.views["v0"] = View(batch.views["v0"].data * mask)
    torch.testing.assert_close(together, task.encode(batch).z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "comes"), [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_embeddings_are_unit_rows(dtype, comes):
    table = task_of(3, dtype, SingleProcess()).encode(batch_of(3, dtype))
    for z in table.z.values():
        assert z.shape == (ROWS, DIM) and z.dtype == comes
        torch.testing.assert_close(z.norm(dim=1), torch.ones(ROWS, dtype=dtype))


def test_features_come_before_the_heads():
    task, batch = task_of(3, torch.float32, SingleProcess()), batch_of(3)
    features = task.features(batch)
    assert {v: x.shape for v, x in features.items()} == dict.fromkeys(batch.views, (ROWS, 8))
    torch.testing.assert_close(features["v2"], task.towers["t2"].encoder(batch.views["v2"]))  # type: ignore[operator]


def test_absent_rows_change_neither_loss_nor_gradient():
    """Filler is whatever it is; the tower sees it, the objective does not."""

    def gradients(batch: Batch) -> list[torch.Tensor]:
        task = task_of(3, torch.float64, SingleProcess())
        return list(torch.autograd.grad(task(batch).total, list(task.parameters())))

    batch, other = batch_of(3, torch.float64), batch_of(3, torch.float64)
    other.views["v2"].data[~other.present["v2"]] = 1e3
    for one, two in zip(gradients(batch), gradients(other)):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_embedding_gradients_go_on_through_the_towers():
    """Encoded in two halves, with the loss's gradient in the embeddings, the sum is the loss's gradient in all."""
    task, batch = task_of(3, torch.float64, SingleProcess()), batch_of(3, torch.float64)
    wanted = torch.autograd.grad(task(batch).total, list(task.parameters()))
    table = task.encode(batch)
    leaves = {v: z.detach().requires_grad_() for v, z in table.z.items()}
    own = task.objective_parameters()
    assert [name for name, p in task.named_parameters() if any(p is q for q in own)] == ["objective.log_temperature"]
    given = torch.autograd.grad(task.score(table._replace(z=leaves)).total, [*leaves.values(), *own])
    found = [torch.zeros_like(p) for p in task.parameters()]
    for begin, end in ((0, 5), (5, ROWS)):
        rows = slice(begin, end)
        part = batch._replace(views={v: View(x.data[rows]) for v, x in batch.views.items()})
        gradients = EmbeddingGradients({v: g[rows] for v, g in zip(leaves, given)}, list(given[3:]) if begin else [])
        one = torch.autograd.grad(
            task(part, gradients), list(task.parameters()), materialize_grads=True, allow_unused=True
        )
        found = [f + g for f, g in zip(found, one)]
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-14)


def test_health_tells_collapse_from_spread():
    task, batch = task_of(2, torch.float32, SingleProcess()), batch_of(2)
    parts = task(batch).parts
    same = batch._replace(views={v: View(x.data[:1].expand(ROWS, -1)) for v, x in batch.views.items()})
    flat = task(same).parts
    for v in batch.views:
        assert float(parts[f"uniformity/{v}"]) < -0.5 and float(parts[f"spread/{v}"]) > 0.3
        assert abs(float(flat[f"uniformity/{v}"])) < 1e-4 and float(flat[f"spread/{v}"]) < 1e-3
        assert not parts[f"spread/{v}"].requires_grad


def test_a_frozen_encoder_stays_as_it_is_but_for_its_last_blocks():
    changes = {"encoder": {"dropout": 0.5, "depth": 3}, "freeze": True}
    task = task_of(3, torch.float32, SingleProcess(), **changes).train()
    one = task.towers["t0"]
    assert not one.encoder.training and one.head.training  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in one.encoder.parameters())  # type: ignore[union-attr]
    batch = batch_of(3)
    torch.testing.assert_close(task.features(batch)["v0"], task.features(batch)["v0"])
    open_ = task_of(3, torch.float32, SingleProcess(), **changes, train_blocks=2).train().towers["t0"]
    trained = {name.split(".")[2] for name, p in open_.named_parameters() if p.requires_grad and "encoder" in name}
    assert trained == {"1", "2"} and open_.encoder.training  # type: ignore[union-attr]


class Bare(nn.Module):
    dim = 8

    def forward(self, view: View) -> torch.Tensor:
        return view.data


def test_a_tower_that_cannot_do_what_it_is_asked_for_says_so():
    with pytest.raises(ValueError, match="train_blocks=4, but MLP has 3 known blocks"):
        task_of(2, torch.float32, SingleProcess(), freeze=True, train_blocks=4, encoder={"depth": 3})
    config = tower().model_copy(update={"encoder": TowerConfig(encoder={"kind": f"{__name__}:Bare"}).encoder})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no checkpoint_activations\(\); set checkpoint_activations=false"):
        Task({"a": "a"}, {"a": config.model_copy(update={"checkpoint_activations": True})}, 4, Bare(), SingleProcess())  # type: ignore[arg-type]

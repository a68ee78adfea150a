"""Probes on data whose answer is known."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.evaluation._probes import knn, linear


def blobs(n: int, distance: float, seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds around corners, labels that are not 0..n-1 and in no order."""
    make = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=make)
    return distance * torch.eye(classes, 16)[y] + torch.randn(n, 16, generator=make), 10 * y + 3


@pytest.mark.parametrize("probe", [linear, knn])
def test_separable_classes_are_found(probe):
    assert probe(*blobs(200, 12.0, 0), *blobs(100, 12.0, 1)) > 0.98


@pytest.mark.parametrize("probe", [linear, knn])
def test_random_features_score_chance(probe):
    (train_x, train_y), (test_x, test_y) = blobs(400, 0.0, 0), blobs(400, 0.0, 1)
    assert abs(probe(train_x, train_y, test_x, test_y) - 0.25) < 0.1


def test_linear_is_near_the_best_possible_between():
    (train_x, train_y), (test_x, test_y) = blobs(2000, 2.0, 0), blobs(2000, 2.0, 1)
    bayes = float((test_x[:, :4].argmax(dim=1) * 10 + 3 == test_y).double().mean())
    assert abs(linear(train_x, train_y, test_x, test_y) - bayes) < 0.03


def test_scale_and_shift_of_features_do_not_matter_to_linear():
    (train_x, train_y), (test_x, test_y) = blobs(300, 3.0, 0), blobs(300, 3.0, 1)
    scale, shift = 10.0 ** torch.linspace(-4, 4, 16), torch.linspace(-50, 50, 16)
    plain = linear(train_x, train_y, test_x, test_y)
    assert abs(linear(train_x * scale + shift, train_y, test_x * scale + shift, test_y) - plain) < 0.02


def test_knn_equals_a_loop():
    (train_x, train_y), (test_x, test_y) = blobs(50, 2.0, 0), blobs(40, 2.0, 1)
    hits = 0
    for x, y in zip(test_x, test_y):
        cosines = [float(x @ t / x.norm() / t.norm()) for t in train_x]
        near = sorted(range(50), key=lambda j: -cosines[j])[:5]
        votes: dict[int, float] = {}
        for j in near:
            votes[int(train_y[j])] = votes.get(int(train_y[j]), 0) + torch.tensor(cosines[j] / 0.07).exp().item()
        hits += max(votes, key=lambda c: votes[c]) == int(y)
    assert knn(train_x, train_y, test_x, test_y, k=5) == pytest.approx(hits / 40)


def test_constant_features_score_the_largest_class():
    y = torch.tensor([4] * 30 + [2] * 10)
    for probe in (linear, knn):
        assert probe(torch.ones(40, 5), y, torch.ones(8, 5), y[26:34]) == 0.5


def test_few_rows_and_rare_classes():
    x, y = torch.randn(12, 3), torch.tensor([0, 1] * 5 + [2, 5])
    for probe in (linear, knn):
        assert 0 <= probe(x, y, x, y) <= 1


@pytest.mark.parametrize("probe", [linear, knn])
@pytest.mark.parametrize(("change", "message"), [
    (lambda x, y: (x, y.new_full(y.shape, 7)), "all training rows are of class 7; a probe needs two classes"),
    (lambda x, y: (x, y - 100), "rows without a label"),
    (lambda x, y: (x / 0, y), "not all finite"),
    (lambda x, y: (x[:5], y), "5 rows and 200 labels"),
    (lambda x, y: (x[:0], y[:0]), "0 rows"),
    (lambda x, y: (x[:, :3], y), "have 3 numbers, test rows 16"),
])  # fmt: skip
def test_bad_inputs_are_refused(probe, change, message):
    with pytest.raises(ValueError, match=message):
        probe(*change(*blobs(200, 1.0, 0)), *blobs(100, 1.0, 1))

"""Uniformity and spread against numpy, and at the two ends: collapsed and spread out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvpretrain.model.health import spread, uniformity


def sphere(b: int, d: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(b, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("b", "d"), [(2, 3), (7, 3), (5, 16)])
def test_against_numpy(b, d):
    x = sphere(b, d)
    z = torch.from_numpy(x)
    pairs = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(b) for j in range(b) if i != j]
    assert float(uniformity(z)) == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)
    assert float(spread(z)) == pytest.approx(x.std(axis=0, ddof=1).mean() * np.sqrt(d), rel=1e-9)


def test_collapsed_and_spread():
    collapsed = torch.from_numpy(sphere(1, 8)).repeat(20, 1)
    assert float(uniformity(collapsed)) == pytest.approx(0, abs=1e-6)
    assert float(spread(collapsed)) == pytest.approx(0, abs=1e-9)
    wide = torch.from_numpy(sphere(2000, 8))
    assert float(uniformity(wide)) < -2.5
    assert float(spread(wide)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_zero(rows):
    z = torch.from_numpy(sphere(3, 4))[:rows]
    assert float(uniformity(z)) == 0 and float(spread(z)) == 0

"""PMRL against numpy's singular value decomposition in loops and torch's gradient of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from mvpretrain.objectives.pmrl import spectrum
from mvpretrain.testing.tables import ROWS, draw, leaves, names, table
from mvpretrain.types import Embeddings
from tests.objectives.checks import (
    assert_finite,
    build,
    floats,
    orthonormal,
)

VARIANTS = [{"spectral_temperature": 0.5, "instance_temperature": 0.2, "instance_weight": 2.0}]


def pmrl(k: int, **config: Any) -> nn.Module:
    return build({"kind": "pmrl", **VARIANTS[0], **config}, k)


def loop(whole: Embeddings) -> dict[str, float]:
    """The docstring's formula, from the singular value decomposition of each row's views."""
    ids, views = whole.ids.tolist(), list(whole.z)
    rows = [i for i in range(len(ids)) if all(whole.present[v][i] for v in views)]
    spectral, leading, shares = [], {}, []
    for i in rows:
        z = np.stack([whole.z[v][i].numpy() for v in views], axis=1)
        u, s, _ = np.linalg.svd(z)
        assert len(u) == len(z)
        logits = np.sqrt(s**2 + 1e-6) / 0.5
        spectral.append(math.log(np.exp(logits).sum()) - logits[0])
        toward = u[:, 0] @ z.sum(axis=1)
        if abs(toward) < 1e-6:
            toward = u[:, 0] @ z[:, 0]
        leading[i] = u[:, 0] * np.sign(toward)
        shares.append(s[0] ** 2 / (s**2).sum())
    instance = []
    for i in rows:
        scores = [leading[i] @ leading[j] / 0.2 for j in rows if j == i or ids[j] != ids[i]]
        instance.append(math.log(math.fsum(map(math.exp, scores))) - 1 / 0.2)
    parts = {"loss/spectral": spectral, "loss/instance": instance, "leading_share": shares}
    found = {name: sum(x) / len(rows) for name, x in parts.items()}
    return found | {"total": found["loss/spectral"] + 2 * found["loss/instance"]}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "equal ids and missing views"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_value_is_that_of_the_loop(k, plain):
    whole = table(k, seed=3, dtype=torch.float64, plain=plain)
    assert floats(pmrl(k)(whole, whole)) == pytest.approx(loop(whole), rel=1e-5)


def test_views_that_span_fewer_dimensions_than_they_are():
    whole = table(5, dim=3, dtype=torch.float64)
    assert floats(pmrl(5)(whole, whole)) == pytest.approx(loop(whole), rel=1e-5)


def test_gradient_is_that_of_torchs_decomposition():
    z, weights = draw(1, ROWS, 3, 6).requires_grad_(), (draw(2, ROWS, 3), draw(3, ROWS, 6))
    u, s, _ = torch.linalg.svd(z.mT, full_matrices=False)
    wanted_leading = u[:, :, 0] * (u[:, :, 0] * z.sum(dim=1)).sum(dim=1, keepdim=True).sign().detach()
    wanted = torch.autograd.grad((s * weights[0]).sum() + (wanted_leading * weights[1]).sum(), z)
    found = spectrum(z)
    torch.testing.assert_close(found.values, s, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.leading, wanted_leading, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad((found.values * weights[0]).sum() + (found.leading * weights[1]).sum(), z)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_sign_is_the_same_for_any_order_of_views_and_sign_of_decomposition():
    z = normalize(draw(4, 200, 4, 6), dim=2)
    leading = spectrum(z).leading
    assert ((leading * z.sum(dim=1)).sum(dim=1) > 0).all()
    torch.testing.assert_close(spectrum(z.flip(1)).leading, leading, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spectrum(-z).leading, -leading, rtol=1e-10, atol=1e-10)


def test_two_views_at_more_than_a_right_angle_point_along_the_first():
    z = torch.tensor([[[1.0, 0.0], [-0.8, 0.6]], [[0.6, 0.8], [-0.6, -0.8]]])
    leading = spectrum(z).leading
    assert ((leading * z[:, 0]).sum(dim=1) > 0.9).all()
    torch.testing.assert_close(leading, normalize(z[:, 0] - z[:, 1], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_coinciding_singular_values_are_finite(k, dtype):
    for whole in (orthonormal(k), mutually_orthogonal(k)):
        whole = leaves(whole._replace(z={v: z.to(dtype) for v, z in whole.z.items()}))
        assert_finite(pmrl(k).to(dtype)(whole, whole), whole)
        assert all(z.grad is not None and z.grad.abs().max() < 1e3 for z in whole.z.values())


def mutually_orthogonal(k: int) -> Embeddings:
    """All singular values are 1."""
    rows = torch.linalg.qr(draw(3, ROWS, ROWS))[0]
    whole = table(k, plain=True, dtype=torch.float64)
    return whole._replace(z={v: rows.roll(i, 0) for i, v in enumerate(names(k))})


def test_what_is_not_finite_reaches_the_loss():
    whole = table(3).rows(slice(1, 4))
    whole.z["view1"][2, 0] = torch.nan
    assert pmrl(3).float()(whole, whole).total.isnan()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="spectral_temperature"):
        pmrl(3, spectral_temperature=0.0)

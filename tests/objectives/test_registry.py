"""Every objective of the registry is held to the laws of mvpretrain.testing: a new file as soon as it is there."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.objectives import registry
from mvpretrain.testing import check_objective
from mvpretrain.testing._building import build, numbers_of_views
from mvpretrain.testing._laws import settings_of
from mvpretrain.testing.tables import table

EXAMPLES = {f"{kind}-{i}": x for kind in registry.kinds() for i, x in enumerate(settings_of(registry, kind))}


of_each = pytest.mark.parametrize("name", EXAMPLES)


@of_each
def test_the_laws_hold(ranks, name):
    check_objective(EXAMPLES[name], ranks(4))


@of_each
def test_half_precision_is_refused_or_computed_well(name):
    k = min(numbers_of_views(EXAMPLES[name]), key=lambda k: abs(k - 3))
    whole = table(k)
    rounded = whole._replace(z={v: z.bfloat16() for v, z in whole.z.items()})
    single = whole._replace(z={v: z.float() for v, z in rounded.z.items()})
    wanted = build(EXAMPLES[name], k, torch.float32)(single, single).total
    try:
        found = build(EXAMPLES[name], k, torch.float32)(rounded, rounded).total
    except (RuntimeError, TypeError, ValueError):
        return
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)

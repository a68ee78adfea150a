"""Every objective of the registry is held to the laws of mvpretrain.testing: a new file as soon as it is there."""

from __future__ import annotations

import pytest

from mvpretrain.objectives import registry
from mvpretrain.testing import check_objective
from mvpretrain.testing._laws import settings_of

EXAMPLES = {f"{kind}-{i}": x for kind in registry.kinds() for i, x in enumerate(settings_of(registry, kind))}


of_each = pytest.mark.parametrize("name", EXAMPLES)


@of_each
def test_the_laws_hold(ranks, name):
    check_objective(EXAMPLES[name], ranks(4))

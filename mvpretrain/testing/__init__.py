"""The laws that every objective, encoder and view is held to, for a user's own classes as for those of the package.

    from mvpretrain.testing import check_objective
    check_objective("my_package.losses:MyObjective", ranks=2)  # each of its examples(), also on two ranks
    check_objective({"kind": "my_package.losses:MyObjective", "power": 2})  # these settings, in one process

Each check raises AssertionError with one sentence that names the law, the settings and the numbers. A class says what
there is to check by `examples()`, a classmethod: its smallest complete settings and their variants, without `kind`. An
objective may also say which numbers of views it takes (`takes(k)`) and that its gradient is not the whole derivative
(`differentiable()`); an encoder gives items that it takes (`example_view(rows)`), and a view draws raw fields
(`sketch(latent)`). The laws are the functions in LAWS of each file here, one docstring each.
"""

from __future__ import annotations

from mvpretrain.testing.encoders import check_encoder
from mvpretrain.testing.objectives import check_objective
from mvpretrain.testing.views import check_view

__all__ = ["check_encoder", "check_objective", "check_view"]

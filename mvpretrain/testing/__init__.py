"""The laws that every objective, encoder and view is held to, for a user's own classes as for those of the package.

    from mvpretrain.testing import check_objective
    check_objective("my_package.losses:MyObjective", ranks=2)  # whatever its examples() give; or {"kind": ..., ...}
    check_encoder({"kind": "my_package.nets:MyEncoder", "width": 8})  # with example_view(rows); check_view likewise

Each check raises AssertionError with one sentence that names the law, the settings and the numbers. A class says what
there is to check: `examples()`, a classmethod, gives its smallest complete settings and their variants without `kind`.
"""

from __future__ import annotations

from mvpretrain.testing.objectives import check_objective

__all__ = ["check_objective"]

"""TempNet."""

from __future__ import annotations

REQUIRED = {"dim": 8}
VARIANTS = [{"in_view": True, "gradient": "features", "gamma": {"value": 0.8}}]

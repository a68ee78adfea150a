"""iSogCLR."""

from __future__ import annotations

VARIANTS = [{"in_view": True, "gradient": "features"}, {"published": True, "gamma": {"value": 0.3, "decay_steps": 4}}]

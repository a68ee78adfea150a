"""SogCLR."""

from __future__ import annotations

VARIANTS = [{"in_view": True}, {"gradient": "features", "eps": 0.1}, {"in_view": True, "published": True}]

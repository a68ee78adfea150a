"""ALDR."""

from __future__ import annotations

VARIANTS = [{"gradient": "features", "margin": 0.1}]

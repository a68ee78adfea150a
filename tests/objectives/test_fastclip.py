"""FastCLIP."""

from __future__ import annotations

VARIANTS = [{"variant": "v0"}, {"variant": "v1", "gradient": "features"}, {"variant": "v2", "in_view": True}, {"variant": "v2", "published": True}, {"published": True}]

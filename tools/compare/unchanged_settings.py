"""The settings under which `unchanged` tries every kind of objective, the same for both states of the package.

A table of its own, not that of the tests, so that a changed test cannot change what is compared. Every kind that a
state of the package knows must stand here; `unchanged` says which do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Settings = dict[str, Any]

SMALL_TAU: Settings = {"temperature": {"init": 0.2, "per_pair": True}}
TWO_TERMS = [
    {"objective": {"kind": "infonce"}, "weight": 0.5},
    {"objective": {"kind": "infonce", "temperature": {"init": 0.3}}, "views": ["view1", "view0"], "name": "first two"},
]
MIXED_TERMS = [
    {"objective": {"kind": "sigmoid", "per_pair": True}, "weight": 2},
    {"objective": {"kind": "infonce", "in_view": True}},
    {"objective": {"kind": "sogclr"}, "weight": 0.25, "name": "averaged"},
]

# Kind -> the settings that are tried; `kind` is filled in by `cases`.
SETTINGS: dict[str, list[Settings]] = {
    "aldr": [{}, {"gradient": "features", "margin": 0.1}, {"alpha": 1.5, "pairs": "view0"}],
    "alignment_uniformity": [{}, {"alpha": 1.0, "t": 3.0, "alignment": 0.5, "uniformity": 2.0}],
    "amcl": [
        {"heads": 1},
        {"heads": 2, "detach": False, "beta": 0.1, "in_view": True},
        {"base": "simclr", "heads": 2, "width": 3, "beta": 0.7, "pairs": "view1"},
        {"base": "infonce", "aggregate": "top", "heads": 2, "kappa": 3, "detach": False},
        {"base": "simsiam", "heads": 2},
        {"base": "barlow", "heads": 2, "eta_low": 0.5, "eta_up": 1.5},
        {"published": True, "heads": 2, "kappa": 5},
    ],
    "barlow": [{}, {"off_diagonal": 0.1}],
    "dbpm": [
        {"objective": {"kind": "infonce"}, "warmup": 1},
        {"objective": {"kind": "dcl"}, "warmup": 1, "noisy": 0.5, "faulty": 0.5, "published": True},
        {"objective": {"kind": "one_vs_rest"}, "warmup": 1, "noisy": 0.3, "faulty": 0.3},
    ],
    "dcl": [{}, {"weighted": 0.5, "temperature": 0.2}],
    "fastclip": [
        {"variant": "v0"},
        {"variant": "v1", "gradient": "features"},
        {"variant": "v2"},
        {"variant": "v2", "in_view": True},
        {"variant": "v2", "published": True},
        {"variant": "v3", "gamma": {"value": 0.2, "decay_steps": 10, "every": 2}},
        {"published": True},
    ],
    "gram": [{}, {"anchor": "all", "label_smoothing": 0.1}, {"anchor": "view1", "temperature": {"init": 0.3}}],
    "infonce": [
        {},
        {"in_view": True},
        {"in_view": True, "gradient": "scalars"},
        {"pairs": "view0", "gradient": "scalars", **SMALL_TAU},
        {"pairs": [["view1", "view0"]], "weights": {"view1-view0": 2.5}, "temperature": {"learnable": False}},
        {"table": "gather", **SMALL_TAU},
        {"table": "ring", **SMALL_TAU},
    ],
    "isogclr": [
        {},
        {"in_view": True, "gradient": "features"},
        {"published": True, "gamma": {"value": 0.3, "decay_steps": 4}},
    ],
    "m3g": [
        {},
        {"temperature": 0.1},
        {"epsilon": 0.05, "tolerance": 1e-5},
        {"views": ["view1", "view0"]},
        {"scope": "rank"},
    ],
    "multi_similarity": [{}, {"labels": True, "margin": None}, {"pairs": "view0", "margin": 0.5, "beta": 10.0}],
    "one_vs_rest": [{}, {"normalize": False}, SMALL_TAU],
    "pmrl": [{}, {"spectral_temperature": 0.5, "instance_temperature": 0.2, "instance_weight": 2.0}],
    "polyview": [{"form": form, "temperature": {"init": 0.2}} for form in ("geometric", "arithmetic", "sufficient")],
    "sigmoid": [{}, {"per_pair": True, "scale": 4.0, "bias": -2.0}, {"learnable": False}],
    "sogclr": [{}, {"in_view": True}, {"gradient": "features", "eps": 0.1}, {"in_view": True, "published": True}],
    "sum": [{"terms": TWO_TERMS}, {"terms": MIXED_TERMS}],
    "supcon": [{}, {"temperature": {"init": 0.1, "learnable": False}}],
    "symile": [{}, {"negatives": "quadratic", "scale": {"init": 2.0, "per_dim": False}}],
    "tempnet": [
        {"prototypes": 16, "sharpness": 1.0},
        {"prototypes": 16, "sharpness": 1.0, "in_view": True, "gradient": "features", "gamma": {"value": 0.8}},
        {"prototypes": 6, "min": 0.1, "max": 0.9, "dropout": 0.2},
    ],
    "triangle": [{}, {"anchor": "all", "alpha": 0.5, "label_smoothing": 0.1}, {"anchor": "view2"}],
    "vicreg": [{}, {"invariance": 5.0, "variance": 10.0, "covariance": 2.0, "deviation": 0.9}],
}

# The numbers of views that are tried, by the number of ranks; a kind that takes others only says so in VIEWS.
BY_RANKS: dict[int, tuple[int, ...]] = {1: (2, 3, 4, 6), 2: (2, 3), 3: (3, 4)}
ALL = (2, 3, 4, 6)
VIEWS: dict[str, tuple[int, ...]] = {"triangle": (3,)}
DTYPES = ("float32", "float64")


def cases(kinds: Iterable[str], ranks: int, thorough: bool = False) -> list[dict[str, Any]]:
    """What a probe on so many ranks tries: name, settings, number of views, type and table of each case.

    Tables: `small` are 12 rows with every complication; `tiled`, where the first settings of a kind are tried once
    more on one rank, are enough rows for several tiles. `thorough`: every number of views on any number of ranks.
    """
    found = []
    for kind in kinds:
        views = [k for k in (ALL if thorough else BY_RANKS[ranks]) if k in VIEWS.get(kind, (k,))]
        for i, settings in enumerate(SETTINGS[kind]):
            tried = [(k, dtype, "small") for k in views for dtype in DTYPES]
            if i == 0 and (ranks == 1 or thorough):
                tried.append((3, "float32", "tiled"))
            for k, dtype, table in tried:
                name = f"{kind} {i}, {k} views, {dtype}, {table} table, {ranks} rank(s)"
                case = {"name": name, "config": {"kind": kind, **settings}, "k": k, "dtype": dtype, "table": table}
                found.append(case)
    return found

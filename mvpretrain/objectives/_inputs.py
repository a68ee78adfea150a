"""What objectives may be given: rows of any float type, inside autocast or not, with anything in absent rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from mvpretrain.types import Embeddings, Losses

Forward = Callable[[Any, Embeddings, Embeddings], Losses]


def any_rows(forward: Forward) -> Forward:
    """An objective's `forward(local, gathered)` that leaves autocast, widens half precision and ignores absent rows.

    float16 and bfloat16 rows are worked on in float32; gradients come back in the rows' type. Rows that are absent are
    0 to the objective, whatever they hold: NaN times 0 would be NaN. Where all rows are there and wide enough, nothing
    is copied; that is asked with one read from the device.
    """

    @wraps(forward)
    def wide(self: Any, local: Embeddings, gathered: Embeddings) -> Losses:
        with torch.autocast(local.ids.device.type, enabled=False):
            same = gathered is local
            local = _clean(local)
            return forward(self, local, local if same else _clean(gathered))

    return wide


def _clean(table: Embeddings) -> Embeddings:
    z = {v: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for v, x in table.z.items()}
    present = torch.stack([table.present[v].all() for v in z]).tolist() if z else []
    for v, complete in zip(z, present):
        if not complete:
            z[v] = z[v].masked_fill(~table.present[v][:, None], 0)
    return table._replace(z=z)

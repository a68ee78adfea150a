"""The most similar candidates of each row, head by head: tile by tile, so that b x n x heads numbers are never held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvpretrain.similarity.blockwise import COLUMNS, ROWS, PairMask, slices


class TopK(NamedTuple):
    """What each row finds among the columns that count for it; -inf and any column where these are too few."""

    similarity: Float[Tensor, "b h k"]  # the k largest in each head, the largest first
    column: Int[Tensor, "b h k"]  # where they are
    mean: Float[Tensor, " b"]  # the largest mean over heads


@torch.no_grad()
def top_k(rows: Float[Tensor, "b h d"], columns: Float[Tensor, "n h d"], k: int, mask: PairMask) -> TopK:
    """The k largest <row, column> of every head, over the columns that `mask` pairs with a row. No gradient.

    Cost: b n h d multiplications. Memory: what is returned, and a tile of 512 x 1024 numbers a head.
    """
    b, heads, _ = rows.shape
    similarity = rows.new_full((b, heads, k), -torch.inf)
    column = torch.zeros(b, heads, k, dtype=torch.int64, device=rows.device)
    mean = rows.new_full((b,), -torch.inf)
    for i, j, tile in head_tiles(rows, columns, mask):
        mean[i] = torch.maximum(mean[i], tile.mean(dim=0).amax(dim=1))
        largest, index = tile.topk(min(k, tile.shape[2]), dim=2)
        similarities = torch.cat([similarity[i], largest.movedim(0, 1)], dim=2)
        indices = torch.cat([column[i], index.movedim(0, 1) + j.start], dim=2)
        similarity[i], chosen = similarities.topk(k, dim=2)
        column[i] = indices.gather(2, chosen)
    return TopK(similarity, column, mean)


def head_tiles(rows: Tensor, columns: Tensor, mask: PairMask) -> Iterator[tuple[slice, slice, Float[Tensor, "h i j"]]]:
    """(rows, columns, the similarities of each head), -inf where a pair does not count."""
    for i in slices(len(rows), ROWS):
        left = rows[i].movedim(1, 0)
        for j in slices(len(columns), COLUMNS):
            excluded = ~(mask.rows[i, None] & mask.columns[j])
            if mask.row_ids is not None and mask.column_ids is not None:
                excluded |= mask.row_ids[i, None] == mask.column_ids[j]
            right = columns[j].to(rows.dtype).permute(1, 2, 0)
            yield i, j, torch.bmm(left, right).masked_fill_(excluded, -torch.inf)

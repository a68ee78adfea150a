"""What a pass over similarities needs beside the tensors with a gradient: the two tables, and which pairs count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mvpretrain.distributed.collectives import Collectives
from mvpretrain.distributed.gather import own_rows, refuse_other_ranks
from mvpretrain.similarity.blockwise import PairMask
from mvpretrain.similarity.groups import Groups
from mvpretrain.types import Embeddings

Direction = tuple[str, str]  # view of the anchors, view of their candidates


def directions_of(pairs: Sequence[tuple[str, str]]) -> list[Direction]:
    """Both directions of each pair of views, (u, v) before (v, u)."""
    return [direction for u, v in pairs for direction in ((u, v), (v, u))]


class AnchorSums(NamedTuple):
    """What the local anchors of one view find among the candidates of another one, over the rows of every rank."""

    lse: Float[Tensor, " b"]  # log sum of e^(scale similarity); -inf where there is no candidate
    argmax: Int[Tensor, " b"]  # the row of the most similar candidate
    positive: Float[Tensor, " b"]  # mean similarity, not scaled, to the candidates of the anchor's id; 0 without any
    is_anchor: Bool[Tensor, " b"]  # whether the row is present and has such a candidate
    anchor_count: Int[Tensor, ""]  # how many rows of every rank are and have


class Tables(NamedTuple):
    """This rank's table and the gathered one; equal ids are one group."""

    local: Embeddings
    gathered: Embeddings
    collectives: Collectives
    exclude_same_id: bool  # whether candidates of an anchor's own id are left out
    groups: Groups

    @classmethod
    def of(cls, local: Embeddings, gathered: Embeddings, collectives: Collectives, exclude_same_id: bool) -> Tables:
        """ValueError: the tables are not those of the ranks of `collectives`."""
        refuse_other_ranks(local, gathered, collectives)
        return cls(local, gathered, collectives, exclude_same_id, Groups.by(gathered.ids))

    @property
    def whole(self) -> slice:
        return slice(0, len(self.gathered.ids))

    @property
    def own(self) -> slice:
        """Where this rank's rows are in the gathered table."""
        return own_rows(self.local, self.collectives)

    def split(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of this rank and the gathered ones by view, from one flat sequence of both."""
        names = list(self.local.z)
        return dict(zip(names, tensors)), dict(zip(names, tensors[len(names) :]))

    def pair_mask(self, rows: Embeddings, a: str, columns: Embeddings, c: str, at: slice = slice(None)) -> PairMask:
        """Which of the anchors `rows` of view a count against the candidates `columns[at]` of view c."""
        ids = (rows.ids, columns.ids[at]) if self.exclude_same_id else ()
        return PairMask(rows.present[a], columns.present[c][at], *ids)

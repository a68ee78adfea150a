"""Row algebra of what travels: what is cut is put together again, and absent rows hold the stated filler."""

from __future__ import annotations

import pytest
import torch

from mvpretrain.types import Batch, Embeddings, View, map_tensors

ROWS = 6


def view(mask: bool = True) -> View:
    return View(torch.randn(ROWS, 4, 3), torch.arange(4) < torch.arange(1, ROWS + 1)[:, None] if mask else None)


def table() -> Embeddings:
    z = {v: torch.randn(ROWS, 5, requires_grad=True) for v in "ab"}
    return Embeddings(z, torch.arange(ROWS), {v: torch.rand(ROWS) > 0.5 for v in "ab"}, torch.arange(ROWS) % 2)


def batch() -> Batch:
    return Batch({"a": view(), "b": view(mask=False)}, *table()[1:])


@pytest.mark.parametrize("whole", [view(), view(mask=False), batch(), table()], ids=lambda x: type(x).__name__)
def test_rows_cut_out_and_put_together_are_the_whole(whole):
    parts = [whole.rows(slice(2)), whole.rows(torch.tensor([2, 3])), whole.rows(slice(4, None))]
    torch.testing.assert_close(type(whole).cat(parts), whole, rtol=0, atol=0)
    assert type(whole).cat(parts[:1]) is parts[0]
    shared = map_tensors(lambda x, y: torch.tensor(x.data_ptr() == y.data_ptr()), whole, whole.rows(slice(2)))
    map_tensors(lambda same: same if same else pytest.fail("a slice was copied"), shared)


def test_items_are_stacked_as_rows_and_shortened():
    for whole in (view(), view(mask=False)):
        items = [View(whole.data[i], None if whole.mask is None else whole.mask[i]) for i in range(ROWS)]
        torch.testing.assert_close(View.stack(items), whole, rtol=0, atol=0)
        short = whole.shorten(2)
        assert torch.equal(short.data, whole.data[:, :2]) and (short.mask is None) == (whole.mask is None)
        assert short.mask is None or short.mask.shape == (ROWS, 2)


def test_split_is_the_reverse_of_cat_also_for_gradients():
    whole = table()
    parts = whole.split(3)
    assert [len(part.ids) for part in parts] == [2, 2, 2]
    torch.testing.assert_close(Embeddings.cat(parts), whole, rtol=0, atol=0)
    weight = torch.randn(ROWS, 5)
    sum(((part.z["a"] * w).sum() for part, w in zip(parts, weight.chunk(3))), torch.tensor(0.0)).backward()
    assert torch.equal(whole.z["a"].grad, weight)  # type: ignore[arg-type]
    assert [len(part.ids) for part in whole.rows(slice(0)).split(2)] == [0, 0]


def test_the_first_of_several_tables_says_which_views_there_are():
    bare = table()._replace(z={})
    assert Embeddings.cat([bare, table()]).z == {}
    assert len(Embeddings.cat([bare, table()]).ids) == 2 * ROWS


def test_padding_is_absent_of_zeros_and_of_minus_ones():
    whole = table()
    assert whole.pad(ROWS) is whole
    more = whole.pad(ROWS + 2)
    torch.testing.assert_close(more.rows(slice(ROWS)), whole, rtol=0, atol=0)
    rest = more.rows(slice(ROWS, None))
    assert not any(z.any() for z in rest.z.values()) and not any(p.any() for p in rest.present.values())
    assert rest.ids.tolist() == rest.labels.tolist() == [-1, -1]

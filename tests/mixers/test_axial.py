"""Axial attention against the axial-attention package; its decoder against a construction by masks; folded lines, orders, leaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from axial_attention import AxialAttention
from torch import Tensor

from mmlong.layout import Layout, scan_order
from mmlong.measure.pattern import seen_by
from mmlong.mixers import Axial, AxialDecoder, create_mixer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_mask(attend: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over all pairs that a mask ``(L, L)`` shows."""
    q, k, v = (t.unflatten(-1, (attend.heads, -1)).transpose(1, 2) for t in attend.project(x))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return attend.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def package(m: Axial, grid: Sequence[int]) -> Any:
    theirs = AxialAttention(m.dim, num_dimensions=len(grid), heads=m.attentions[0].heads, sum_axial_out=m.join == "sum")
    for mine, other in zip(m.attentions, theirs.axial_attentions, strict=True):
        own: Any = mine
        other.fn.to_q.weight, other.fn.to_out.weight = own.q_proj.weight, own.out_proj.weight
        other.fn.to_out.bias = own.out_proj.bias
        # One matrix of theirs is two of ours: made anew from them at each call, so that gradients reach them.
        del other.fn.to_kv
        other.fn.to_kv = _Pair(own.k_proj, own.v_proj)
    return theirs


class _Pair(torch.nn.Module):
    def __init__(self, one: torch.nn.Module, two: torch.nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


@pytest.mark.parametrize("join", ["sum", "chain"])
@pytest.mark.parametrize(
    ("grid", "order"),
    [((5, 7), "raster"), ((6, 4), "hilbert"), ((2, 9), "raster"), ((3, 4, 5), "raster"), ((3, 4, 2), "pixels:morton")],
)
@pytest.mark.oracle("axial-attention: AxialAttention", "axial")
def test_against_the_package(same_as: Callable[..., None], grid: tuple[int, ...], order: str, join: Any) -> None:
    torch.manual_seed(0)
    m = Axial(12, axes=len(grid), join=join, heads=3).double()
    x, cells = tokens(2, math.prod(grid), 12), scan_order(grid, order)
    image = torch.zeros_like(x).index_copy(1, cells, x).unflatten(1, grid)
    expected = package(m, grid)(image).flatten(1, -2)[:, cells]
    same_as(m, x, m(x, None, Layout(grid=grid, order=order)), (expected, None), 1e-11)


@pytest.mark.parametrize("length", [7, 12, 16, 17, 31])
@pytest.mark.parametrize("join", ["sum", "chain"])
@pytest.mark.oracle("definition: all pairs, under masks", "axial")
def test_a_line_is_folded(same_as: Callable[..., None], join: Any, length: int) -> None:
    """Rows of about the root of the length; the last one may be short."""
    torch.manual_seed(0)
    m = Axial(8, join=join, heads=2).double()
    x = tokens(2, length, 8)
    width = math.ceil(math.sqrt(length))
    row, column = torch.arange(length) // width, torch.arange(length) % width
    masks = [column[:, None] == column, row[:, None] == row]
    total, chained = torch.zeros_like(x), x
    for attend, mask in zip(m.attentions, masks, strict=True):
        total, chained = total + by_mask(attend, x, mask), by_mask(attend, chained, mask)
    same_as(m, x, m(x), (total if join == "sum" else chained, None), 1e-11)


def test_an_axis_of_one_cell_hands_on_the_values() -> None:
    m, x = Axial(8, axes=3, along=[0]).double(), tokens(2, 7, 8)
    expected = m.attentions[0].out_proj(m.attentions[0].v_proj(x))
    torch.testing.assert_close(m(x)[0], expected)
    torch.testing.assert_close(m(x, None, Layout(grid=(7,)))[0], expected)
    assert Axial(8)(torch.randn(1, 1, 8))[0].shape == (1, 1, 8)


def test_one_axis_a_layer() -> None:
    torch.manual_seed(0)
    both = Axial(8, join="chain").double()
    one, two = (Axial(8, along=[axis]).double() for axis in (0, 1))
    one.attentions[0].load_state_dict(both.attentions[0].state_dict())
    two.attentions[0].load_state_dict(both.attentions[1].state_dict())
    x, layout = tokens(1, 20, 8), Layout(grid=(4, 5))
    torch.testing.assert_close(two(one(x, None, layout)[0], None, layout)[0], both(x, None, layout)[0])


def decoded(m: AxialDecoder, x: Tensor) -> Tensor:
    """The decoder, every attention over all pairs under its mask."""
    T, W = x.shape[1], m.width
    here = torch.arange(T)
    row, column = here // W, here % W
    r = x + by_mask(m.row, x, row[:, None] == row)
    u = r + by_mask(m.column, m.column_norm(r), (column[:, None] == column) & (row[:, None] >= row))
    # What is short of a row below is read by nobody.
    down = torch.cat([torch.zeros(x.shape[0], W, m.dim, dtype=x.dtype), u], 1)[:, :T]
    return by_mask(m.inner, m.inner_norm(x + down), (row[:, None] == row) & (here[:, None] >= here))


@pytest.mark.parametrize(("width", "length"), [(2, 7), (4, 1), (4, 4), (4, 5), (5, 23), (5, 25), (6, 36), (9, 7)])
@pytest.mark.oracle("definition: all pairs, under masks", "axial_decoder")
def test_decoder_is_its_construction(
    same_as: Callable[..., None], held: Callable[..., None], width: int, length: int
) -> None:
    torch.manual_seed(0)
    m = AxialDecoder(8, width=width, heads=2).double()
    x = tokens(2, length, 8)
    y, _ = m(x)
    expected = decoded(m, x)
    if length > 2 * width:
        same_as(m, x, (y, None), (expected, None), 1e-11)
    else:
        # Of one row above, columns have one key: what chooses among them has a gradient of rounding, or none.
        held(x, (y, None), (expected, None))
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_decoder_in_pieces_and_token_by_token() -> None:
    torch.manual_seed(0)
    m, x = AxialDecoder(8, width=6, heads=2).double(), tokens(2, 41, 8)
    expected = decoded(m, x)
    for sizes in ([6, 6, 12, 1, 5, 11], [5, 1, 1, 13, 21], [1] * 41):
        state, found = None, []
        for piece in x.split(sizes, 1):
            y, state = m(piece, state)
            found.append(y)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-11, atol=1e-12)


def test_decoder_sees_all_that_came_before_and_nothing_else() -> None:
    """Every position, by gradient; plain masked rows and masked columns would leave out what stands above and to the side."""
    seen = seen_by(AxialDecoder(8, width=5, heads=2), 8, 23) > 0
    assert torch.equal(seen, torch.ones(23, 23, dtype=torch.bool).tril())


def test_encoder_sees_its_row_and_its_column() -> None:
    row, column = torch.arange(24) // 6, torch.arange(24) % 6
    cross = (row[:, None] == row) | (column[:, None] == column)
    layout = Layout(grid=(4, 6))
    assert torch.equal(seen_by(Axial(8), 8, 24, layout) > 0, cross)
    assert bool((seen_by(Axial(8, join="chain"), 8, 24, layout) > 0).all())


def test_documents_are_folded_each_by_itself() -> None:
    m, x = Axial(8).double(), tokens(2, 20, 8)
    y, _ = m(x, None, Layout(lengths=torch.tensor([20, 7])))
    torch.testing.assert_close(y[1:, :7], m(x[1:, :7])[0])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("axial", {"causal": True}, "no causal form"),
        ("axial", {"axes": 0}, "axes"),
        ("axial", {"along": [2]}, "0 .. 1"),
        ("axial", {"along": []}, "along"),
        ("axial", {"join": "product"}, "join"),
        ("axial", {"heads": 3}, "divide"),
        ("axial_decoder", {"width": 0}, "width"),
        ("axial_decoder", {"causal": False}, "causal only"),
    ],
)
def test_impossible_options(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_mixer(name, 8, **options)


def test_layouts_that_do_not_fit() -> None:
    x = torch.randn(1, 24, 8)
    with pytest.raises(ValueError, match="at most 2 axes"):
        Axial(8)(x, None, Layout(grid=(2, 3, 4)))
    with pytest.raises(ValueError, match="not the cells"):
        Axial(8)(x, None, Layout(grid=(6, 6)).slice(2, 26))
    with pytest.raises(ValueError, match="no lengths"):
        Axial(8)(x, None, Layout(grid=(4, 6), lengths=torch.tensor([24])))
    with pytest.raises(ValueError, match="give width=6"):
        AxialDecoder(8, width=5)(x, None, Layout(grid=(4, 6)))

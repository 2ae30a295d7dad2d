"""Rectangles of a grid as lists of blocks: what is listed is what the rectangles hold, and no more."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops import grid_blocks
from mmlong.ops.grid_blocks import Rectangle, Span, grid_attention

CASES = [
    (Rectangle(2, 3, 2, 0, 3), Span(0, 6, 9), Span(0, 6, 9)),
    (Rectangle(4, 4, 2, 2, 1), Span(0, 8, 10), Span(0, 8, 10)),
    (Rectangle(3, 2, 4, 0, 0), Span(7, 9, 5), Span(3, 9, 5)),
    (Rectangle(1, 1, 0, 0, 0), Span(2, 3, 4), Span(0, 3, 4)),
]


@pytest.mark.parametrize(("rectangle", "asked", "held"), CASES)
def test_lists_hold_the_rectangles(rectangle: Rectangle, asked: Span, held: Span) -> None:
    h, w = rectangle.h, rectangle.w
    asked, held = (grid_blocks._rounded(s, h, w) for s in (asked, held))
    keys, counts = grid_blocks._lists(rectangle, asked, held)
    kh, kw = rectangle.key_block
    cells = torch.cartesian_prod(torch.arange(held.first, held.stop), torch.arange(held.width))
    block = grid_blocks._slots(cells[None], held, kh, kw)[0] // (kh * kw)
    for n, (row, count) in enumerate(zip(keys, counts, strict=True)):
        corner = torch.tensor([asked.first + n // (asked.width // w) * h, n % (asked.width // w) * w])
        inside = rectangle.sees(corner, cells)
        listed = torch.isin(block, torch.from_numpy(row[:count]))
        assert torch.equal(inside, listed)
        assert (row[count:] == -1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_rows_whose_cells_differ(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rectangle, span = Rectangle(3, 2, 2, 0 if causal else 2, 1), Span(0, 7, 6)
    cells = torch.cartesian_prod(torch.arange(7), torch.arange(6))
    cells = torch.stack([cells, cells[torch.randperm(42)]])
    q, k, v = (torch.randn(2, 2, 42, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    few = grid_attention(q, k, v, cells, cells, (span, span), rectangle, causal)
    monkeypatch.setattr(grid_blocks, "MASK_ELEMENTS", 1)
    y = grid_attention(q, k, v, cells, cells, (span, span), rectangle, causal)
    torch.testing.assert_close(y, few, rtol=1e-11, atol=1e-12)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(few, (q, k, v), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

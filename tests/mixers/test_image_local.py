"""Image Transformer's local attention against dense softmax under masks made from the paper's words, cell by cell; orders, pieces, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout, scan_order
from mmlong.measure.pattern import seen_by
from mmlong.mixers import ImageLocal1d, ImageLocal2d, create_mixer
from mmlong.ops.rotary import rotary_reference


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def dense(m: Any, x: Tensor, mask: Tensor, rope: bool) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    if rope:
        q, k = (rotary_reference(t.transpose(1, 2), torch.arange(x.shape[1])).transpose(1, 2) for t in (q, k))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return m.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def line_mask(length: int, block: int, memory: int, causal: bool) -> Tensor:
    """Query blocks one after another, each with its memory block."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start in range(0, length, block):
        for i in range(start, min(start + block, length)):
            for j in range(max(0, start - memory), length):
                mask[i, j] = j <= i if causal else j < start + block + memory
    return mask


def grid_mask(cells: list[tuple[int, int]], m: ImageLocal2d, block: tuple[int, int], memory: tuple[int, int]) -> Tensor:
    """Of cells in the order of the sequence: is the key within the query's block, extended to the top, left and right, and generated before?"""
    mask = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for i, (r, c) in enumerate(cells):
        top, left = r - r % block[0], c - c % block[1]
        bottom = top + block[0] + (0 if m.causal else memory[0])
        for j, (y, x) in enumerate(cells):
            inside = top - memory[0] <= y < bottom and left - memory[1] <= x < left + block[1] + memory[1]
            mask[i, j] = inside and (j <= i or not m.causal)
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(("block", "memory", "length"), [(5, 3, 32), (4, 4, 16), (1, 6, 20), (7, 0, 15), (64, 64, 9)])
@pytest.mark.oracle("definition: all pairs, under the paper's mask", "image_local_1d")
def test_blocks_of_a_line(
    same_as: Callable[..., None], block: int, memory: int, length: int, rope: bool, causal: bool
) -> None:
    torch.manual_seed(0)
    m = ImageLocal1d(8, causal=causal, block=block, memory=memory, heads=2, rope=rope).double()
    x = tokens(2, length, 8)
    expected = dense(m, x, line_mask(length, block, memory, causal), rope)
    same_as(m, x, (m(x)[0], None), (expected, None), 1e-11)


CASES: list[tuple[tuple[int, int], str, tuple[int, int], tuple[int, int]]] = [
    ((8, 10), "raster", (2, 5), (2, 5)),
    ((8, 10), "block_raster:4", (4, 4), (2, 3)),
    ((9, 11), "serpentine", (2, 3), (3, 1)),
    ((9, 11), "hilbert", (3, 4), (1, 2)),
    ((7, 5), "random:3", (3, 2), (0, 4)),
    ((5, 8), "morton", (4, 4), (4, 0)),
    ((1, 30), "raster", (4, 6), (4, 6)),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("few", [1 << 16, 1])
@pytest.mark.parametrize(("grid", "order", "block", "memory"), CASES)
@pytest.mark.oracle("definition: all pairs, under the paper's mask", "image_local_2d")
def test_blocks_of_a_grid(
    same_as: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    grid: tuple[int, int],
    order: str,
    block: tuple[int, int],
    memory: tuple[int, int],
    few: int,
    causal: bool,
) -> None:
    """Both as lists of blocks and under an explicit mask."""
    monkeypatch.setattr("mmlong.ops.grid_blocks.MASK_ELEMENTS", few)
    torch.manual_seed(0)
    m = ImageLocal2d(8, causal=causal, width=grid[1], block=block, memory=memory, heads=2).double()
    x = tokens(2, math.prod(grid), 8)
    cells = [divmod(int(c), grid[1]) for c in scan_order(grid, order)]
    expected = dense(m, x, grid_mask(cells, m, block, memory), rope=False)
    same_as(m, x, (m(x, None, Layout(grid=grid, order=order))[0], None), (expected, None), 1e-11)


@torch.no_grad()
@pytest.mark.parametrize("few", [1 << 16, 1])
@pytest.mark.parametrize("order", ["raster", "serpentine", "block_raster:3"])
def test_pieces_of_an_image(order: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With far fewer keys kept than there were, and the same for rows of a batch whose cells differ."""
    monkeypatch.setattr("mmlong.ops.grid_blocks.MASK_ELEMENTS", few)
    torch.manual_seed(0)
    grid = (20, 7)
    m = ImageLocal2d(8, width=7, block=(3, 2), memory=(2, 3), heads=2).double()
    x, layout = tokens(2, 140, 8), Layout(grid=grid, order=order)
    whole, after = m(x, None, layout)
    assert after["k"].shape[2] == 42
    mixed = torch.cat([layout.coordinates(140), Layout(grid=grid).coordinates(140)])
    found = [m(x[1:], None, Layout(grid=grid))[0]]
    for sizes, given in (([1, 20, 42, 77], layout), ([1] * 140, layout), ([9, 131], Layout(positions=mixed))):
        state, start, parts = None, 0, []
        for piece in x.split(sizes, 1):
            y, state = m(piece, state, given.slice(start, start + piece.shape[1]))
            start += piece.shape[1]
            parts.append(y)
        y = torch.cat(parts, 1)
        torch.testing.assert_close(y[:1], whole[:1])
        torch.testing.assert_close(y[1:], whole[1:] if given is layout else found[0])


@torch.no_grad()
def test_without_a_layout_rows_are_of_a_width() -> None:
    """What generation relies on: it gives none."""
    m, x = ImageLocal2d(8, width=6, block=(2, 3), memory=(2, 1)).double(), tokens(2, 48, 8)
    torch.testing.assert_close(m(x)[0], m(x, None, Layout(grid=(8, 6)))[0])


def test_the_pattern_that_the_docstring_shows() -> None:
    m = ImageLocal2d(8, width=8, block=(2, 2), memory=(1, 1), heads=1)
    seen = (seen_by(m, 8, 40, Layout(grid=(5, 8)))[3 * 8 + 2] > 0).view(5, 8)
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[1:4, 1:5] = True
    expected[3, 3:] = False
    assert torch.equal(seen, expected)
    seen = seen_by(ImageLocal1d(8, block=3, memory=2), 8, 7) > 0
    assert torch.equal(seen, line_mask(7, 3, 2, True))


def test_padding_within_an_image() -> None:
    m, x = ImageLocal2d(8, width=6, block=(2, 3), memory=(2, 1)).double(), tokens(2, 36, 8)
    layout = Layout(grid=(6, 6), order="serpentine", lengths=torch.tensor([36, 14]))
    y, _ = m(x, None, layout)
    whole, _ = m(x, None, Layout(grid=(6, 6), order="serpentine"))
    torch.testing.assert_close(y[0], whole[0])
    torch.testing.assert_close(y[1, :14], whole[1, :14])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("image_local_1d", {"block": 0}, "block >= 1"),
        ("image_local_1d", {"memory": -1}, "memory >= 0"),
        ("image_local_1d", {"heads": 3}, "divide"),
        ("image_local_2d", {"block": [4]}, "two numbers"),
        ("image_local_2d", {"block": [0, 4]}, "two numbers"),
        ("image_local_2d", {"memory": [2, -1]}, "two from 0"),
        ("image_local_2d", {"width": 0}, "width >= 1"),
    ],
)
def test_impossible_options(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_mixer(name, 8, **options)


def test_layouts_that_do_not_fit() -> None:
    m, x = ImageLocal2d(8, width=6, block=(2, 2), memory=(2, 2)), torch.randn(1, 48, 8)
    with pytest.raises(ValueError, match="give width=8"):
        m(x, None, Layout(grid=(6, 8)))
    with pytest.raises(ValueError, match="at most 2 axes"):
        m(x, None, Layout(grid=(2, 4, 6)))
    twice = Layout(positions=torch.zeros(1, 48, 2))
    with pytest.raises(ValueError, match="none twice"):
        m(x, None, twice)
    with pytest.raises(ValueError, match="rows and columns"):
        m(x, None, Layout(positions=torch.rand(1, 48, 2)))
    with pytest.raises(ValueError, match="not the cells"):
        ImageLocal2d(8, causal=False)(x, None, Layout(grid=(9, 6)).slice(3, 51))
    # Up again after rows were let go.
    up = Layout(grid=(8, 6)).coordinates(48).flip(1)
    _, state = m(x, None, Layout(positions=torch.cat([up[:, :6], up[:, 12:], up[:, 6:12]], 1).flip(1)))
    with pytest.raises(ValueError, match="go down the rows"):
        m(x[:, :1], state, Layout(positions=torch.zeros(1, 1, 2)))

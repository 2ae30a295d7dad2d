"""Tokens on their grid: any scan order, and positions that fill a grid."""

from __future__ import annotations

import pytest
import torch

from mmlong.layout import Layout, scan_order
from mmlong.ops.raster import raster_of

ORDERS = ["raster", "serpentine", "hilbert", "morton", "block_raster:2", "random:3"]


@pytest.mark.parametrize("order", ORDERS)
def test_laid_tokens_are_the_image(order: str) -> None:
    """As the layout module unrolls it, and from the coordinates that it says the tokens have."""
    image = torch.randn(2, 35, 3)
    x = image[:, scan_order((5, 7), order)]
    layout = Layout(grid=(5, 7), order=order)
    for told in (layout, Layout(positions=layout.coordinates(35)), Layout(positions=layout.coordinates(35).float())):
        raster = raster_of(told, 35, 2, "x")
        assert raster.grid == (5, 7)
        assert torch.equal(raster.lay(x), image)
        assert torch.equal(raster.unroll(image), x)
    assert (raster_of(layout, 35, 2, "x").cells is None) == (order == "raster")


def test_rows_in_orders_of_their_own() -> None:
    cells = torch.stack([torch.randperm(12) for _ in range(3)])
    image = torch.randn(3, 12, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.stack(torch.unravel_index(cells, (2, 3, 2)), -1)
    raster = raster_of(Layout(positions=positions), 12, 3, "x")
    assert raster.grid == (2, 3, 2)
    x = raster.unroll(image)
    assert torch.equal(x, torch.stack([row[c] for row, c in zip(image, cells, strict=True)]))
    assert torch.equal(raster.lay(x), image)
    assert torch.autograd.gradcheck(raster.lay, image)
    assert torch.autograd.gradcheck(raster.unroll, image)


def test_a_reversed_grid_is_that_grid() -> None:
    layout, x = Layout(grid=(3, 5), order="hilbert"), torch.randn(2, 15, 4)
    there = raster_of(layout.flip(15), 15, 2, "x")
    assert torch.equal(there.lay(x.flip(1)), raster_of(layout, 15, 2, "x").lay(x))


def test_fewer_axes_and_no_grid() -> None:
    assert raster_of(None, 6, 3, "x").grid == (1, 1, 6)
    assert raster_of(Layout(), 6, 1, "x").grid == (6,)
    assert raster_of(Layout(grid=(2, 3)), 6, 3, "x").grid == (1, 2, 3)
    with pytest.raises(ValueError, match=r"x reads a grid of at most 2 axes, \(1, 2, 3\) has 3"):
        raster_of(Layout(grid=(1, 2, 3)), 6, 2, "x")


@pytest.mark.parametrize(
    "positions",
    [
        [[0, 0], [0, 1], [1, 0], [1, 0]],  # one cell twice
        [[0, 0], [0, 1], [1, 0], [1, 2]],  # not as many as cells
        [[0, 0.5], [0, 1], [1, 0], [1, 1]],
        [[1, -1], [0, 1], [1, 0], [1, 1]],  # counted in rows of 2, its cell would be 1
        [[1e18, 0], [0, 1], [1, 0], [1, 1]],
        [[float("nan"), 0], [0, 1], [1, 0], [1, 1]],
    ],
)
def test_positions_that_do_not_fill_a_grid_are_refused(positions: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="not the cells of one, each once"):
        raster_of(Layout(positions=torch.tensor([positions])), 4, 2, "x")

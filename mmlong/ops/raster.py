"""Tokens of a grid in any scan order, put into raster order and back.

Definition, where token ``t`` is the grid's cell ``c_t``, counted with the last axis fastest: ``lay(x)[c_t] = x_t`` and ``unroll(y)_t = y[c_t]``.

What a layout says of a grid is read here: its scan order, or positions, if these are the coordinates of a grid's cells, each once (as after a reversal or another permutation of the tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlong.layout import Layout, scan_order
from mmlong.ops.places import gather, spread


@dataclass(frozen=True, eq=False)
class Raster:
    """A grid, and where on it tokens are.

    Attributes:
        grid: extent of each axis.
        cells: int64 ``(1 or B, L)``, the cell of each token; ``None`` where they are in raster order as they come.
    """

    grid: tuple[int, ...]
    cells: Tensor | None = None

    def lay(self, x: Tensor) -> Tensor:
        """Tokens ``(B, L, D)`` in raster order."""
        return x if self.cells is None else spread(x, self._places(x), x.shape[1])

    def unroll(self, y: Tensor) -> Tensor:
        """Cells ``(B, L, D)`` in the order of the tokens."""
        return y if self.cells is None else gather(y, self._places(y))

    def _places(self, x: Tensor) -> Tensor:
        assert self.cells is not None
        return self.cells.to(x.device).expand(x.shape[0], -1)


def raster_of(layout: Layout | None, length: int, axes: int, name: str) -> Raster:
    """The grid that a layout describes.

    Args:
        layout: what the tokens are; without a grid or positions they are a line.
        length: L, tokens.
        axes: how many the grid comes to have: one that has fewer gets axes of length 1 before its own.
        name: of the mixer, for errors.

    Raises:
        ValueError: a grid of more axes, or positions that are not the cells of a grid, each once. (Positions are looked at, which on a GPU waits for them.)
    """
    cells: Tensor | None = None
    if layout is not None and layout.grid is not None:
        grid = layout.grid
        if layout.order != "raster":
            cells = scan_order(grid, layout.order)[None]
    elif layout is not None and layout.positions is not None:
        found = _filled(layout.positions)
        if found is None:
            raise ValueError(
                f"{name} reads a whole grid, and layout.positions are not the cells of one, each once: give layout.grid, the shape that the sequence was unrolled from"
            )
        grid, cells = found
    else:
        grid = (length,)
    if len(grid) > axes:
        raise ValueError(f"{name} reads a grid of at most {axes} axes, {grid} has {len(grid)}")
    return Raster((1,) * (axes - len(grid)) + grid, cells)


def _filled(positions: Tensor) -> tuple[tuple[int, ...], Tensor] | None:
    """The grid that positions ``(1 or B, L, k)`` fill, and the cell of each; ``None`` if they do not."""
    rounded = positions.round() if positions.is_floating_point() else positions
    coordinates = rounded.long()
    grid = tuple(int(n) + 1 for n in coordinates.amax((0, 1)))
    every = torch.arange(positions.shape[1], device=positions.device)
    if math.prod(grid) != len(every) or bool((coordinates != positions).any()) or int(coordinates.amin()) < 0:
        return None
    cells = torch.zeros_like(coordinates[..., 0])
    for axis, n in enumerate(grid):
        cells = cells * n + coordinates[..., axis]
    return (grid, cells) if bool((cells.sort(1).values == every).all()) else None

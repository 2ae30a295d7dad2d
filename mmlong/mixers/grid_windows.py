"""Attention in windows of an image with learned relative positions: Swin's windows and NAT's neighbourhoods.

All are softmax attention of a cell over a window of ``k x k`` cells, with a bias for every difference of rows and columns and head, and work and memory linear in the number of cells. What the token ``o`` sees, with windows of 3 x 3
(``swin_2d`` with and without its shift of 1, ``neighborhood_2d`` inside and at a border, where the window does not shrink)::

    # # # . . .    . . . . . .    . . . . . .    # # o . . .
    # # # . . .    . # # # . .    . # # # . .    # # # . . .
    # # o . . .    . # o # . .    . # o # . .    # # # . . .
    . . . . . .    . # # # . .    . # # # . .    . . . . . .

- ``swin_2d`` follows Liu et al. 2021, "Swin Transformer" (arXiv 2103.14030): all cells of a window see all of it. A layer without a shift and one with half a window's, in turns, let windows reach each other; so use two in turns.
- ``neighborhood_2d`` follows Hassani, Walton, Li, Li & Shi 2022, "Neighborhood Attention Transformer" (arXiv 2204.07143): every cell sees the window around it, and ``dilation`` takes the cells at multiples of so many rows and columns
  (Hassani & Shi 2022, arXiv 2209.15001).
- ``neighborhood_3d`` is the same on a grid of three axes, as the authors' library has it: frames, height and width of a video, with so many cells along each. Its window is around a cell in time too, so it sees where things came from and where they go.

The grid and its scan order are read from the layout; or from positions, if these are the cells of a grid, each once. They take whole grids, so they have neither a state nor padded rows. Without a layout a row is an image of height 1.

Departures: windows that the grid does not fill are short, where the authors fill them up with zeros that are seen; an axis no longer than a window is one window and is not shifted, each axis by itself; an axis shorter than a neighbourhood is
seen whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.grid_windows import Group, neighbourhood_groups, swin_groups, window_attention
from mmlong.ops.raster import raster_of


class GridWindows(Mixer):
    """Base: projections, the table of biases, and the grid.

    Args:
        dim: width D.
        causal: always false.
        sides: cells of a window along each axis.
        heads: heads H; ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        bias: of the projections of queries, keys and values.
        relative: learn a bias for every offset.

    Raises:
        ValueError: sizes that do not divide. When called: a grid of more axes, or positions that do not fill one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        sides: Sequence[int],
        heads: int | None,
        head_dim: int | None,
        bias: bool,
        relative: bool,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.axes = len(sides)
        self.heads, _, self.head_dim = head_sizes(type(self).__name__, dim, heads, None, head_dim)
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=bias)
        self.k_proj = nn.Linear(dim, inner, bias=bias)
        self.v_proj = nn.Linear(dim, inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim)
        self.relative_bias: nn.Parameter | None = None
        if relative:
            self.relative_bias = nn.Parameter(torch.empty(self.heads, math.prod(2 * n - 1 for n in sides)))
            nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def groups(self, grid: tuple[int, ...]) -> Sequence[Group]:
        """The windows of a grid of as many axes."""
        raise TypeError(f"{type(self).__name__} does not define groups(grid)")

    def state_bytes(self, length: int) -> int:
        return 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        raster = raster_of(layout, x.shape[1], self.axes, type(self).__name__)
        cells = raster.lay(x)
        q, k, v = (p(cells).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = window_attention(q, k, v, self.relative_bias, self.groups(raster.grid), self.head_dim**-0.5)
        return raster.unroll(self.out_proj(y.flatten(2))), None


@register_mixer(
    "swin_2d",
    paper="Liu et al. 2021, arXiv 2103.14030",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    grid=True,
    padding=False,
    resets=False,
    note="windows that the grid does not fill are short; proved against transformers' SwinLayer, weights copied, shifted and not",
)
class Swin2d(GridWindows):
    """Swin's windows.

    Args:
        dim: width D.
        causal: always false.
        window: cells along an axis of a window.
        shift: by how many cells windows begin later, for every other layer ``window // 2``.
        heads, head_dim, bias, relative: as :class:`GridWindows`.

    Raises:
        ValueError: sizes that do not divide, a window below 1, a shift that is not from 0 to below the window.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        window: int = 7,
        shift: int = 0,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        relative: bool = True,
    ) -> None:
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"swin_2d needs window >= 1 and 0 <= shift < window, got {window} and {shift}")
        super().__init__(
            dim, causal=causal, sides=(window, window), heads=heads, head_dim=head_dim, bias=bias, relative=relative
        )
        self.window, self.shift = window, shift

    def groups(self, grid: tuple[int, ...]) -> Sequence[Group]:
        height, width = grid
        return swin_groups((height, width), self.window, self.shift)


@register_mixer(
    "neighborhood_2d",
    paper="Hassani et al. 2022, arXiv 2204.07143; Hassani & Shi 2022, arXiv 2209.15001",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    grid=True,
    padding=False,
    resets=False,
    note="proved against its definition in float64, cell by cell (natten has no build here); an axis shorter than the window is seen whole",
)
class Neighborhood2d(GridWindows):
    """NAT's and DiNAT's neighbourhoods.

    Args:
        dim: width D.
        causal: always false.
        kernel: cells along an axis of a window, odd.
        dilation: rows and columns from one cell of a window to the next.
        heads, head_dim, bias, relative: as :class:`GridWindows`.

    Raises:
        ValueError: sizes that do not divide, an even kernel, a dilation below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        kernel: int = 7,
        dilation: int = 1,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        relative: bool = True,
    ) -> None:
        if kernel < 1 or kernel % 2 == 0 or dilation < 1:
            raise ValueError(f"neighborhood_2d needs an odd kernel and dilation >= 1, got {kernel} and {dilation}")
        super().__init__(
            dim, causal=causal, sides=(kernel, kernel), heads=heads, head_dim=head_dim, bias=bias, relative=relative
        )
        self.kernel, self.dilation = kernel, dilation

    def groups(self, grid: tuple[int, ...]) -> Sequence[Group]:
        return neighbourhood_groups(grid, (self.kernel, self.kernel), self.dilation)


@register_mixer(
    "neighborhood_3d",
    paper="Hassani et al. 2022, arXiv 2204.07143; Hassani & Shi 2022, arXiv 2209.15001",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    grid=True,
    padding=False,
    resets=False,
    note="the papers' neighbourhoods on three axes; proved against its definition in float64, cell by cell; an axis shorter than the window is seen whole",
)
class Neighborhood3d(GridWindows):
    """Neighbourhoods in space and time.

    Args:
        dim: width D.
        causal: always false.
        kernel: cells of a window along each axis, all odd; a grid of fewer axes has the last of them.
        dilation: steps along each axis from one cell of a window to the next.
        heads, head_dim, bias, relative: as :class:`GridWindows`.

    Raises:
        ValueError: sizes that do not divide, other than three kernels, an even one, a dilation below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        kernel: Sequence[int] = (3, 5, 5),
        dilation: int = 1,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        relative: bool = True,
    ) -> None:
        sides = tuple(int(n) for n in kernel)
        if len(sides) != 3 or any(n < 1 or n % 2 == 0 for n in sides) or dilation < 1:
            raise ValueError(
                f"neighborhood_3d needs three odd kernels and dilation >= 1, got {list(sides)} and {dilation}"
            )
        super().__init__(dim, causal=causal, sides=sides, heads=heads, head_dim=head_dim, bias=bias, relative=relative)
        self.kernel, self.dilation = sides, dilation

    def groups(self, grid: tuple[int, ...]) -> Sequence[Group]:
        return neighbourhood_groups(grid, self.kernel, self.dilation)

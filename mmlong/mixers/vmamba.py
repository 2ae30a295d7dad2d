"""VMamba: selective scans over an image in four directions (SS2D).

Follows Liu, Tian, Zhao, Yu, Xie, Wang, Ye, Jiao & Liu 2024, "VMamba: Visual State Space Model" (arXiv 2401.10166), in the form of its first version, with a gate. On a grid of
``H x W`` tokens:

    u, z = W_in x;   u = silu(3 x 3 depthwise convolution of u)
    y_k = S6_k(u along the way k)           1: row by row; 2: column by column; 3, 4: these from their ends
    out = W_out (LayerNorm(y_1 + y_2 + y_3 + y_4) * silu(z))

where each ``y_k`` is put back in its place before the sum, and every way has a selection of its own (:mod:`mmlong.mixers.selection`), as its projections and skip. Later versions of the paper leave out
``z`` and make room for a feed-forward layer; here that is the backbone's in either case.

The grid and its scan order are read from the layout; or from positions, if these are the cells of a grid, each once. The ways are the grid's own, whatever the order in which its tokens come. It takes whole
grids, so it has neither a state nor padded rows. Without a layout a row is an image of height 1.

Nothing departs from that form. A way's scan is run again in the backward pass, so that between them only ``u`` is kept, and not four times what a scan keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.selection import Selection
from mmlong.mixers.state import State
from mmlong.ops.raster import raster_of


class Way(Selection):
    """One way over the grid.

    Args:
        width: channels.
        d_state, dt_rank: as :class:`VMamba` has them.
        columns: column by column instead of row by row.
        back: from the last token to the first.
    """

    def __init__(self, width: int, d_state: int, dt_rank: int, columns: bool, back: bool) -> None:
        super().__init__()
        self.columns, self.back = columns, back
        self.make_selection(width, d_state, dt_rank)
        self.reset_selection()

    def forward(self, u: Tensor, height: int, width: int) -> Tensor:
        """Tokens ``(B, height * width, D)`` in raster order to the scan's outputs, in raster order."""
        along = _turned(u, height, width) if self.columns else u
        y, _ = self.select(along.flip(1) if self.back else along)
        y = y.flip(1) if self.back else y
        return _turned(y, width, height) if self.columns else y


def _turned(u: Tensor, height: int, width: int) -> Tensor:
    """A raster of ``height`` rows, column by column."""
    return u.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)


@register_mixer(
    "vmamba",
    paper="Liu et al. 2024, arXiv 2401.10166",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    grid=True,
    padding=False,
    resets=False,
    note="SS2D with its gate, as in the paper's first version; proved against mambapy's scan in four directions and torch's conv2d",
)
class VMamba(Mixer):
    """The SS2D mixer.

    Args:
        dim: width D.
        causal: always false.
        expand: inner width over ``dim``.
        d_state: modes N of a channel, in each direction.
        dt_rank: rank of the step's projections; ``None`` for ``dim / 16``, rounded up.
        d_conv: side of the convolution's window, odd.

    Raises:
        ValueError: sizes below 1, an even ``d_conv``. When called: a grid of more than two axes, or positions that do not fill one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        expand: float = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        d_conv: int = 3,
    ) -> None:
        super().__init__(dim, causal=causal)
        inner = round(expand * dim)
        rank = -(-dim // 16) if dt_rank is None else dt_rank
        if min(inner, d_state, rank, d_conv) < 1 or d_conv % 2 == 0:
            raise ValueError(
                f"vmamba: the inner width {inner} (expand x dim), d_state {d_state}, dt_rank {rank} and d_conv {d_conv} must be at least 1, and d_conv odd"
            )
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner)
        self.ways = nn.ModuleList(
            Way(inner, d_state, rank, columns, back) for back in (False, True) for columns in (False, True)
        )
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        raster = raster_of(layout, x.shape[1], 2, "vmamba")
        height, width = raster.grid
        cells = raster.lay(x)
        w_u, w_z = self.in_proj.weight.chunk(2)
        # Channels last in memory, as the tokens lie: no copy.
        image = F.linear(cells, w_u).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        u = F.silu(self.conv(image)).permute(0, 2, 3, 1).flatten(1, 2)
        y = self.out_norm(_crossed(self.ways, u, height, width)) * F.silu(F.linear(cells, w_z))
        return raster.unroll(self.out_proj(y)), None


def _crossed(ways: nn.ModuleList, u: Tensor, height: int, width: int) -> Tensor:
    """The sum of the ways ``(B, L, D)``, in raster order."""
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    total: Tensor | None = None
    for way in ways:
        if again:
            y = checkpoint(way, u, height, width, use_reentrant=False, preserve_rng_state=False)
        else:
            y = way(u, height, width)
        total = y if total is None else total + y
    assert total is not None
    return total

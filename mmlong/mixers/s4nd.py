"""S4ND: convolution over an N-d grid with the outer product of one state space's kernel an axis.

Follows Nguyen, Goel, Gu, Downs, Shah, Dao, Baccus & Re 2022, "S4ND: Modeling Images and Videos as Multidimensional Signals with State Spaces" (arXiv 2210.06583). For every
channel, over a grid with the axes ``1 .. d``:

    K[l_1, .., l_d] = k_1[l_1] k_2[l_2] .. k_d[l_d]
    y = K conv u + D u;   out = GLU(W gelu(y) + b)

Every ``k_a`` has two sides, each with a readout of its own: at lags from 0 on it is the kernel of an S4D state space, and at lag ``-1 - l`` what a second readout of that state space has at ``l``. The
outer product makes the convolution separable, so it is done axis by axis: no kernel of the grid's size and no N-d FFT. A short axis is one product with the Toeplitz matrix of its kernel, a
long one two runs of :mod:`mmlong.ops.diagonal`.

The grid and its scan order are read from the layout; or from positions, if these are the cells of a grid, each once. It takes whole grids, so it has neither a state nor padded rows. Without a
layout a row is a line: the other axes have length 1, as the first of a grid of fewer axes have, and their kernels are their values at lag 0.

``bandlimit`` silences modes too fast for the grid that was trained on (section 4.3 of the paper), and ``rate`` is the distance of two cells in units of that grid: half of it for one twice as
fine. Kernels so limited keep their shape there.

Departures: kernels are S4D's (zero-order hold, B = 1), not S4's; the tensor is of rank one, as it is by default in the authors' code; kernels reach as far as the grid. Steps start
between 0.01 and 1, since an axis is far shorter than a sequence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.state import State
from mmlong.mixers.state_space import Init, StateSpace
from mmlong.ops.diagonal import diagonal_kernel, diagonal_recurrence, multiply
from mmlong.ops.raster import raster_of

MATRIX = 256
"""Longest axis that is multiplied by a matrix: beyond, its cost in time and memory exceeds that of two recurrences."""


@register_mixer(
    "s4nd",
    paper="Nguyen et al. 2022, arXiv 2210.06583",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    grid=True,
    padding=False,
    resets=False,
    continuous=True,
    note="S4D kernels, rank one; proved against scipy's zero-order hold and N-d FFTs; axis by axis in place of an FFT",
)
class S4ND(StateSpace):
    """The S4ND layer.

    Args:
        dim: width D.
        causal: always false.
        axes: most axes of a grid.
        d_state: N, twice the number of complex modes of a channel and axis.
        init: modes at the start, as :class:`~mmlong.mixers.s4d.S4D`'s.
        dt_min, dt_max: steps at the start are log-uniform between these.
        rate: distance of neighbouring cells, in those of the grid that was trained on; an attribute, to be set on a trained mixer.
        bandlimit: modes that turn by so many half circles a cell of that grid, or more, are silent; 1 is Nyquist's frequency, ``None`` silences none.
        chunk: tokens a chunk on long axes; ``None`` for the op's default.

    Raises:
        ValueError: ``axes`` below 1, a ``rate`` or ``bandlimit`` that is not positive, an odd or non-positive ``d_state``, an unknown ``init``, a chunk below 1,
            steps that are not 0 < dt_min <= dt_max. When called: a grid of more axes, or positions that do not fill one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        axes: int = 2,
        d_state: int = 64,
        init: Init = "legs",
        dt_min: float = 1e-2,
        dt_max: float = 1.0,
        rate: float = 1.0,
        bandlimit: float | None = None,
        chunk: int | None = None,
    ) -> None:
        if axes < 1:
            raise ValueError(f"s4nd: axes must be at least 1, got {axes}")
        if not rate > 0 or (bandlimit is not None and not bandlimit > 0):
            raise ValueError(f"s4nd: rate and bandlimit must be above 0, got {rate} and {bandlimit}")
        super().__init__(
            dim,
            causal=causal,
            name="s4nd",
            systems=(axes, dim),
            readouts=(2, axes, dim),
            d_state=d_state,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            chunk=chunk,
        )
        self.axes, self.rate, self.bandlimit = axes, rate, bandlimit
        self.D = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D's initial values on every axis; D is standard normal."""
        self.reset_system()
        self.D.normal_()

    def change_step(self, factor: float) -> None:
        """Cells ``factor`` times as far apart along every axis: ``rate``, since ``bandlimit`` goes by the steps that were trained. It is no weight, so a copy is built with it as an option."""
        self.rate *= factor

    def state_bytes(self, length: int) -> int:
        return 0

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``dt A`` ``(axes, D, N/2, 2)`` and ``C B_bar`` ``(2, axes, D, N/2, 2)``, complex numbers as pairs."""
        lam, held = self.zero_order_hold(dtype, self.rate)
        c = multiply(self.C.to(dtype), held)
        if self.bandlimit is not None:
            # At the steps that were trained: on a finer grid the modes that no training has heard stay silent.
            c = c * (lam[..., 1:].abs() < self.bandlimit * math.pi * self.rate)
        return lam, c

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, D = x.shape
        raster = raster_of(layout, L, self.axes, "s4nd")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            lam, c = self.discretise(dtype)
            # From axis to axis: the present one first, those that are done behind the batch.
            z = raster.lay(x.to(dtype)).permute(2, 1, 0)
            for axis, n in enumerate(raster.grid):
                z = _along(z.reshape(D, n, -1), lam[axis], c[:, axis], self.chunk)
            y = raster.unroll(z.reshape(D, B, L).permute(1, 2, 0))
        y = F.gelu(torch.addcmul(y.to(x.dtype), x, self.D.to(x.dtype)))
        return F.glu(self.out_proj(y), dim=-1), None


def _along(z: Tensor, lam: Tensor, c: Tensor, chunk: int | None) -> Tensor:
    """The convolution along the first axis: ``z (D, n, R)``, modes ``lam (D, M, 2)`` and readouts ``c (2, D, M, 2)`` to ``(D, R, n)``."""
    n = z.shape[1]
    if n > MATRIX:
        u = z.permute(2, 1, 0)
        ahead, _ = diagonal_recurrence(u, lam, c[0], chunk=chunk)
        back, _ = diagonal_recurrence(u.flip(1), lam, c[1], strict=True, chunk=chunk)
        return (ahead + back.flip(1)).permute(2, 0, 1)
    ahead, back = diagonal_kernel(lam, c[0], n), diagonal_kernel(lam, c[1], n)
    # Lags n - 1 .. 0 and -1 .. 1 - n: row t of the matrix has t - s at s.
    kernel = torch.cat([ahead.flip(1), back[:, : n - 1]], 1)
    matrix = kernel.unfold(1, n, 1).flip(1)
    return torch.bmm(z.mT, matrix.mT)

"""H3: keys through a shift state space, their products with values through a diagonal one, read by queries.

Follows Fu, Dao, Saab, Thomas, Rudra & Re 2022, "Hungry Hungry Hippos: Towards Language Modeling with State Space Models" (arXiv 2212.14052). Of a head
with ``d`` channels, from linear projections q, k, v:

    k'_t = sum_{l<N} s_l k_{t-l}                                       shift: s of each channel
    Z_t  = k'_t v_t^T                                                  (d, d)
    Y_t  = SSM_diag(Z)_t + D Z_t                                       every entry alone, all by the head's one system
    out  = W_o [q_t^T Y_t of each head]

The shift system's matrix moves its state by one place, its input matrix is the first basis vector: with any readout it is the causal filter of ``N`` taps that
:mod:`mmlong.ops.short_conv` computes. The diagonal one is S4D's (:mod:`mmlong.ops.diagonal`), with ``N / 2`` complex modes:

    A = -exp(log_A_real) + i A_imag;   a = (1 + dt A / 2) / (1 - dt A / 2);   b = dt / (1 - dt A / 2)      (bilinear, B = 1)
    h_t = a h_{t-1} + b z_t;   SSM_diag(z)_t = 2 Re(C h_t)

The rule is bilinear as in the authors' code, whose initial values these are too. Departures: what that code trains as a product is one parameter here: both
input matrices are part of the readouts, and the skip of the shift is part of its first tap. The state keeps ``h / b``, a sum of past inputs alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.state import State
from mmlong.mixers.state_space import Init, StateSpace
from mmlong.ops.diagonal import diagonal_recurrence, multiply
from mmlong.ops.short_conv import short_conv

LEAST = 1e-30
"""Of a squared mode, so that its logarithm is finite."""


@register_mixer(
    "h3",
    paper="Fu et al. 2022, arXiv 2212.14052",
    note="bilinear as the authors' code; B = 1, part of C; proved against scipy's bilinear rule and shift matrices simulated",
)
class H3(StateSpace):
    """The H3 layer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        d_state: N, taps of the shift and twice the number of complex modes of a head.
        head_dim: channels d of a head, whose state is ``d^2 N`` numbers; 1 is the authors' default.
        init: modes at the start, as :class:`~mmlong.mixers.s4d.S4D`'s.
        dt_min, dt_max: steps at the start are log-uniform between these.
        chunk: tokens a chunk of the diagonal system; ``None`` for the op's default.

    Raises:
        ValueError: an odd or non-positive ``d_state``, heads that do not divide D, an unknown ``init``, a chunk below 1, steps that are not
            0 < dt_min <= dt_max.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        head_dim: int = 1,
        init: Init = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk: int | None = None,
    ) -> None:
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"h3: head_dim must divide dim {dim}, got {head_dim}")
        self.head_dim, self.heads = head_dim, dim // head_dim
        super().__init__(
            dim,
            causal=causal,
            name="h3",
            systems=(self.heads,),
            readouts=(self.heads,),
            d_state=d_state,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            chunk=chunk,
        )
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.shift = nn.Parameter(torch.empty(dim, d_state))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: taps as a convolution's, with a standard normal skip in the present one; C complex normal, D normal."""
        bound = self.d_state**-0.5
        nn.init.uniform_(self.shift, -bound, bound)
        self.shift[:, -1].add_(torch.randn_like(self.shift[:, -1]))
        self.reset_system()
        self.D.normal_()

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * (self.d_state - 1 + self.head_dim * self.d_state)

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``log a`` and ``C b``, both ``(H, N/2, 2)``, complex numbers as pairs."""
        dt = self.log_dt.to(dtype).exp()[:, None]
        # Half of dt A is x + iy.
        x, y = -dt * self.log_A_real.to(dtype).exp() / 2, dt * self.A_imag.to(dtype) / 2
        size, left = (1 - x).square() + y.square(), (1 + x).square() + y.square()
        # The logarithm of left / size by its difference from 1, which keeps the digits of slow modes, or as it stands, which keeps those of fast ones.
        change = 4 * x / size
        fast = change < -0.5
        slow = torch.log1p(torch.where(fast, -0.5, change))
        decay = torch.where(fast, (left.clamp_min(LEAST) / size).log(), slow) / 2
        angle = torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x)
        b = torch.stack([dt * (1 - x) / size, dt * y / size], -1)
        return torch.stack([decay, angle], -1), multiply(self.C.to(dtype), b)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        tail, h = (None, None) if state is None else (state["shift"], state["h"].flatten(0, 1))
        (B, L, _), (H, d) = x.shape, (self.heads, self.head_dim)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.in_proj(x).to(dtype).chunk(3, -1)
        k, tail = short_conv(k, self.shift.to(dtype), None, tail, layout)
        # (B, d of keys, d of values, L, H): to the op, each entry of a product is a row of its own.
        q, k, v = (t.view(B, L, H, d).permute(0, 3, 1, 2) for t in (q, k.contiguous(), v))
        z = (k[:, :, None] * v[:, None]).flatten(0, 2)
        lam, c = self.discretise(dtype)
        y, h = diagonal_recurrence(z, lam, c, h, _for_each(layout, d * d), chunk=self.chunk)
        y = torch.addcmul(y, z, self.D.to(dtype)).view(B, d, d, L, H)
        y = (q[:, :, None] * y).sum(1).permute(0, 2, 3, 1).reshape(B, L, H * d)
        return self.out_proj(y.to(x.dtype)), {"shift": tail, "h": h.unflatten(0, (B, d * d))}


def _for_each(layout: Layout | None, times: int) -> Layout | None:
    """The layout of rows that each stand ``times`` in a row."""
    if layout is None or times == 1:
        return layout
    lengths, resets = (t if t is None else t.repeat_interleave(times, 0) for t in (layout.lengths, layout.resets))
    return replace(layout, lengths=lengths, resets=resets, grid=None, order="raster", positions=None, codes=None)

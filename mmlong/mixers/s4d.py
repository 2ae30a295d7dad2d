"""S4D: a diagonal state space a channel, run in chunks, or one token at a time.

Follows Gu, Gupta, Goel & Re 2022, "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893). For every channel
with ``N / 2`` complex modes (the other half are their conjugates) and a step ``dt``:

    A = -exp(log_A_real) + i A_imag;   A_bar = exp(dt A);   B_bar = (A_bar - 1) / A        (zero-order hold, B = 1)
    h_t = A_bar h_{t-1} + B_bar u_t;   y_t = 2 Re(C h_t) + D u_t;   out = GLU(W gelu(y) + b)

The form with two sides has a second ``C``, whose kernel runs backwards over the tokens after the present one (as S4's bidirectional kernel).
Departures: ``B`` is one, trained as part of ``C`` (of which the kernel sees only the product), also for the LegS initial values; the kernel is applied in chunks, by
matrix products, instead of an FFT (:mod:`mmlong.ops.diagonal`). The state keeps ``h / B_bar``, a sum of past inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.state_space import Init, KernelLayer
from mmlong.ops.diagonal import diagonal_recurrence, multiply


@register_mixer(
    "s4d",
    paper="Gu, Gupta, Goel & Re 2022, arXiv 2206.11893",
    bidirectional=True,
    state="constant",
    cost="n",
    continuous=True,
    note="proved against scipy's matrix exponential and zero-order hold; B = 1, part of C; chunks in place of an FFT",
)
class S4D(KernelLayer):
    """The S4D layer.

    Args:
        dim: width D, one state space a channel.
        causal: see the past, or both sides with two kernels.
        d_state: N, twice the number of complex modes of a channel.
        init: modes at the start: ``"lin"`` ``-1/2 + i pi n``; ``"inv"`` ``-1/2 + i (N / pi) (N / (2n + 1) - 1)``; ``"legs"`` the eigenvalues of the
            normal part of HiPPO-LegS.
        dt_min, dt_max: steps at the start are log-uniform between these.
        chunk: tokens a chunk; ``None`` for the op's default.

    Raises:
        ValueError: an odd or non-positive ``d_state``, an unknown ``init``, a chunk below 1, steps that are not 0 < dt_min <= dt_max.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        init: Init = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            dim, causal=causal, name="s4d", d_state=d_state, init=init, dt_min=dt_min, dt_max=dt_max, chunk=chunk
        )
        self.reset_parameters()

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``dt A`` ``(D, N/2, 2)`` and ``C B_bar`` ``(1 or 2, D, N/2, 2)``, complex numbers as pairs."""
        lam, held = self.zero_order_hold(dtype)
        return lam, multiply(self.C.to(dtype), held)

    def run(
        self,
        x: Tensor,
        system: tuple[Tensor, Tensor],
        side: int,
        h: Tensor | None,
        layout: Layout | None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        lam, c = system
        return diagonal_recurrence(x, lam, c[side], h, layout, strict, self.chunk)

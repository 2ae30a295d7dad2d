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

import math
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.hippo import hippo_modes
from mmlong.mixers.state import State
from mmlong.ops.diagonal import diagonal_recurrence

Init = Literal["lin", "inv", "legs"]


@register_mixer(
    "s4d",
    paper="Gu, Gupta, Goel & Re 2022, arXiv 2206.11893",
    bidirectional=True,
    state="constant",
    cost="n",
    note="proved against scipy's matrix exponential and zero-order hold; B = 1, part of C; chunks in place of an FFT",
)
class S4D(Mixer):
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
        ValueError: an odd or non-positive ``d_state``, an unknown ``init``, steps that are not 0 < dt_min <= dt_max.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "log_dt": {"weight_decay": 0.0, "lr_scale": 0.1},
        "log_A_real": {"weight_decay": 0.0, "lr_scale": 0.1},
        "A_imag": {"weight_decay": 0.0, "lr_scale": 0.1},
        "D": {"weight_decay": 0.0},
    }

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
        super().__init__(dim, causal=causal)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"s4d: d_state must be even (conjugate pairs) and at least 2, got {d_state}")
        if init not in get_args(Init):
            raise ValueError(f"s4d: unknown init {init!r}; use one of {', '.join(get_args(Init))}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"s4d: steps must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"s4d: chunk must be at least 1, got {chunk}")
        self.d_state, self.init, self.dt_range, self.chunk = d_state, init, (dt_min, dt_max), chunk
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(dim))
        self.log_A_real = nn.Parameter(torch.empty(dim, modes))
        self.A_imag = nn.Parameter(torch.empty(dim, modes))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, dim, modes, 2))
        self.D = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values; C is standard complex normal and D standard normal."""
        low, high = self.dt_range
        self.log_dt.uniform_(math.log(low), math.log(high))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(initial_frequencies(self.init, self.d_state).expand_as(self.A_imag))
        self.C.normal_(std=0.5**0.5)
        self.D.normal_()

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * self.d_state if self.streaming else 0

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``dt A`` ``(D, N/2, 2)`` and ``C B_bar`` ``(1 or 2, D, N/2, 2)``, complex numbers as pairs."""
        dt = self.log_dt.to(dtype).exp()[:, None]
        real, imag = -self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype)
        lam = torch.stack([dt * real, dt * imag], -1)
        # exp(x + iy) - 1, without the loss of digits of a difference near 1.
        grown, half = torch.expm1(lam[..., 0]), torch.sin(lam[..., 1] / 2)
        up = grown * torch.cos(lam[..., 1]) - 2 * half.square()
        turn = (grown + 1) * torch.sin(lam[..., 1])
        size = real.square() + imag.square()
        b_real, b_imag = (up * real + turn * imag) / size, (turn * real - up * imag) / size
        c_real, c_imag = self.C.to(dtype).unbind(-1)
        return lam, torch.stack([c_real * b_real - c_imag * b_imag, c_real * b_imag + c_imag * b_real], -1)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        lam, c = self.discretise(torch.promote_types(x.dtype, torch.float32))
        before = None if state is None else state["h"]
        y, after = diagonal_recurrence(x, lam, c[0], before, layout, chunk=self.chunk)
        if not self.causal:
            around = layout or Layout()
            turned = around.flip(x.shape[1])
            back, _ = diagonal_recurrence(around.flip_tokens(x), lam, c[1], None, turned, True, self.chunk)
            y = y + around.flip_tokens(back)
        y = F.gelu(torch.addcmul(y, x, self.D.to(x.dtype)))
        return F.glu(self.out_proj(y), dim=-1), {"h": after} if self.causal else None


def initial_frequencies(init: Init, d_state: int) -> Tensor:
    """Imaginary parts of A ``(d_state / 2,)`` by section 4 of the paper; the real part is -1/2 in all three."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        return math.pi * n
    if init == "inv":
        return d_state / math.pi * (d_state / (2 * n + 1) - 1)
    return hippo_modes(d_state)[0].imag.clone()

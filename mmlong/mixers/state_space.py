"""What state spaces of one small system a channel share: S4, S4D, S4ND and H3.

The continuous system's diagonal and the step, as parameters with their initial values; the rule of zero-order hold; and the layer around one or two
kernels of S4 and S4D (Gu, Goel & Re 2021, arXiv 2111.00396; Gu, Gupta, Goel & Re 2022, arXiv 2206.11893):

    y = k conv u (+ k' conv u, backwards over the tokens after the present one) + D u;   out = GLU(W gelu(y) + b)

A system has ``N / 2`` complex modes, the other half being their conjugates. Complex numbers are pairs of reals in parameters and states.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer
from mmlong.mixers.hippo import hippo_modes
from mmlong.mixers.state import State

Init = Literal["lin", "inv", "legs"]


class StateSpace(Mixer):
    """The parameters.

    Args:
        dim: width D.
        causal: as the mixer is built.
        name: of the mixer, for errors.
        systems: shape of the set of systems.
        readouts: shape of the set of readouts C.
        d_state: N, twice the number of complex modes of a system.
        init: modes at the start; see :func:`initial_frequencies`.
        dt_min, dt_max: steps at the start are log-uniform between these.
        chunk: tokens a chunk; ``None`` for the op's default.

    Raises:
        ValueError: an odd or non-positive ``d_state``, an unknown ``init``, a chunk below 1, steps that are not 0 < dt_min <= dt_max.
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
        causal: bool,
        name: str,
        systems: tuple[int, ...],
        readouts: tuple[int, ...],
        d_state: int,
        init: Init,
        dt_min: float,
        dt_max: float,
        chunk: int | None,
    ) -> None:
        super().__init__(dim, causal=causal)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"{name}: d_state must be even (conjugate pairs) and at least 2, got {d_state}")
        if init not in get_args(Init):
            raise ValueError(f"{name}: unknown init {init!r}; use one of {', '.join(get_args(Init))}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"{name}: steps must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"{name}: chunk must be at least 1, got {chunk}")
        self.d_state, self.init, self.dt_range, self.chunk = d_state, init, (dt_min, dt_max), chunk
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(*systems))
        self.log_A_real = nn.Parameter(torch.empty(*systems, modes))
        self.A_imag = nn.Parameter(torch.empty(*systems, modes))
        self.C = nn.Parameter(torch.empty(*readouts, modes, 2))

    @torch.no_grad()
    def reset_system(self) -> None:
        """The papers' initial values; C is standard complex normal."""
        low, high = self.dt_range
        self.log_dt.uniform_(math.log(low), math.log(high))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(initial_frequencies(self.init, self.d_state).expand_as(self.A_imag))
        self.C.normal_(std=0.5**0.5)

    def change_step(self, factor: float) -> None:
        """Longer or shorter steps of the same system, which the rule that discretises it then holds."""
        self.log_dt.add_(math.log(factor))

    def zero_order_hold(self, dtype: torch.dtype, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """``dt A`` and ``(exp(dt A) - 1) / A``, both ``(*systems, N / 2, 2)``; steps are ``rate`` times the parameter's."""
        dt = rate * self.log_dt.to(dtype).exp()[..., None]
        real, imag = -self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype)
        lam = torch.stack([dt * real, dt * imag], -1)
        # exp(x + iy) - 1, without the loss of digits of a difference near 1.
        grown, half = torch.expm1(lam[..., 0]), torch.sin(lam[..., 1] / 2)
        up = grown * torch.cos(lam[..., 1]) - 2 * half.square()
        turn = (grown + 1) * torch.sin(lam[..., 1])
        size = real.square() + imag.square()
        return lam, torch.stack([(up * real + turn * imag) / size, (turn * real - up * imag) / size], -1)


def initial_frequencies(init: Init, d_state: int) -> Tensor:
    """Imaginary parts of A at the start ``(d_state / 2,)``, by section 4 of the S4D paper; the real part is -1/2 in all three.

    ``"lin"``: ``pi n``; ``"inv"``: ``(N / pi) (N / (2n + 1) - 1)``; ``"legs"``: of the eigenvalues of the normal part of HiPPO-LegS.
    """
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "lin":
        return math.pi * n
    if init == "inv":
        return d_state / math.pi * (d_state / (2 * n + 1) - 1)
    return hippo_modes(d_state)[0].imag.clone()


class KernelLayer(StateSpace):
    """A system a channel, read by one kernel or by two, and a gated projection. Arguments as :class:`StateSpace`; subclasses run the system."""

    def __init__(self, dim: int, *, causal: bool, name: str, **options: Any) -> None:
        sides = 1 if causal else 2
        super().__init__(dim, causal=causal, name=name, systems=(dim,), readouts=(sides, dim), **options)
        self.D = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The papers' initial values; D is standard normal."""
        self.reset_system()
        self.D.normal_()

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * self.d_state if self.streaming else 0

    def discretise(self, dtype: torch.dtype) -> Any:
        """The discrete system, in the form that :meth:`run` takes."""
        raise TypeError(f"{type(self).__name__} does not define discretise(dtype)")

    def run(
        self, x: Tensor, system: Any, side: int, h: Tensor | None, layout: Layout | None, strict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One kernel over a piece of a sequence: ``(y (B, L, D), state (B, D, N / 2, 2))``.

        Args:
            x: ``(B, L, D)``.
            system: of :meth:`discretise`.
            side: which readout.
            h, layout, strict: as the ops have them.
        """
        raise TypeError(f"{type(self).__name__} does not define run(x, system, side, h, layout, strict)")

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        system = self.discretise(torch.promote_types(x.dtype, torch.float32))
        y, after = self.run(x, system, 0, None if state is None else state["h"], layout)
        if not self.causal:
            around = layout or Layout()
            back, _ = self.run(around.flip_tokens(x), system, 1, None, around.flip(x.shape[1]), strict=True)
            y = y + around.flip_tokens(back)
        y = F.gelu(torch.addcmul(y, x, self.D.to(x.dtype)))
        return F.glu(self.out_proj(y), dim=-1), {"h": after} if self.causal else None

"""One diagonal state space over all channels, its modes complex and constant: the LRU and S5.

Both project a token to ``N`` complex modes, run ``h_t = lambda h_{t-1} + w_t`` (:mod:`mmlong.ops.scan`) and project back, where S4D keeps a small state space
for every channel; they differ in how the modes come about, and in the gate that follows.

LRU follows Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349), section 3:

    lambda = exp(-exp(nu_log) + i exp(theta_log));   h_t = lambda h_{t-1} + exp(gamma_log) (B x_t);   y_t = Re(C h_t) + D x_t
    out = GLU(W gelu(y) + b)

``|lambda|^2`` starts uniform between ``r_min^2`` and ``r_max^2`` (a ring of the disc), the phase uniform up to ``max_phase``, and gamma at ``sqrt(1 - |lambda|^2)``.

S5 follows Smith, Warrington & Linderman 2022, "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933): a continuous system with
one mode of each conjugate pair and a step for each mode, held by zero-order hold,

    lambda = exp(dt Lambda);   B_bar = (lambda - 1) / Lambda B;   h_t = lambda h_{t-1} + B_bar x_t;   y_t = 2 Re(C h_t) + D x_t
    out = g * sigmoid(W g + b),  g = gelu(y)

``Lambda`` starts at the eigenvalues of the normal part of HiPPO-LegS, in ``blocks`` copies, B and C as real and complex random matrices in the basis of its eigenvectors; the
form with two sides has a second C, which reads a recurrence that runs backwards (and sees the present token too, as the authors' does). Departures: LRU's ring defaults to [0.9, 0.999],
for long sequences; S5's ``Re Lambda`` is always kept below -1e-4, the authors' option ``clip_eigs``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.hippo import hippo_modes
from mmlong.mixers.state import State
from mmlong.ops.scan import scan

SLOWEST = -1e-4
"""Upper bound of S5's ``Re Lambda``."""


class _OneSystem(Mixer):
    """What LRU and S5 share: in by a complex matrix, through the modes, out by a complex matrix. Complex parameters are pairs of reals.

    Args:
        dim: width D.
        causal: see the past, or both sides.
        modes: N.
    """

    def __init__(self, dim: int, *, causal: bool, modes: int) -> None:
        super().__init__(dim, causal=causal)
        self.modes = modes
        self.B = nn.Parameter(torch.empty(modes, dim, 2))
        self.C = nn.Parameter(torch.empty(1 if causal else 2, dim, modes, 2))
        self.D = nn.Parameter(torch.empty(dim))

    def state_bytes(self, length: int) -> int:
        return 8 * self.modes if self.streaming else 0

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``lambda`` complex ``(N,)``, the matrix in complex ``(N, D)``, the matrices out ``(1 or 2, D, N, 2)``; ``dtype`` is real."""
        raise TypeError(f"{type(self).__name__} does not define discretise(dtype)")

    def finish(self, y: Tensor) -> Tensor:
        """The gate after the system."""
        raise TypeError(f"{type(self).__name__} does not define finish(y)")

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        lam, b, c = self.discretise(torch.promote_types(x.dtype, torch.float32))
        before = None if state is None else torch.view_as_complex(state["h"])
        h, after = _through(x, lam, b, before, layout)
        y = _read(h, c[0])
        if not self.causal:
            around = layout or Layout()
            turned, _ = _through(around.flip_tokens(x), lam, b, None, around.flip(x.shape[1]))
            y = y + around.flip_tokens(_read(turned, c[1]))
        y = torch.addcmul(y.to(x.dtype), x, self.D.to(x.dtype))
        return self.finish(F.gelu(y)), {"h": torch.view_as_real(after)} if self.causal else None


def _through(x: Tensor, lam: Tensor, b: Tensor, h: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of all modes side by side ``(B, L, 2 N)``, and the last ones, complex ``(B, N)``."""
    pairs = torch.view_as_real(b).transpose(1, 2).flatten(0, 1)  # (2 N, D), a mode's two parts next to each other
    w = F.linear(x, pairs.to(x.dtype)).to(pairs.dtype)
    states, after = scan(lam, torch.view_as_complex(w.unflatten(-1, (-1, 2))), h, layout)
    return torch.view_as_real(states).flatten(-2), after


def _read(h: Tensor, c: Tensor) -> Tensor:
    """``Re(C h)``."""
    return F.linear(h, (c * c.new_tensor([1.0, -1.0])).flatten(1))


def _less_one(x: Tensor, y: Tensor) -> Tensor:
    """``exp(x + iy) - 1``, complex, without the loss of digits of a difference near 1."""
    grown, half = torch.expm1(x), torch.sin(y / 2)
    return torch.complex(grown * torch.cos(y) - 2 * half.square(), (grown + 1) * torch.sin(y))


@register_mixer(
    "lru",
    paper="Orvieto et al. 2023, arXiv 2303.06349",
    continuous=True,
    note="proved against lru-pytorch, weights copied, and scipy's filter; ring [0.9, 0.999] by default",
)
class LRU(_OneSystem):
    """The linear recurrent unit.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        d_state: complex modes N; ``None`` for ``dim``.
        r_min, r_max: sizes of the modes at the start.
        max_phase: largest phase of a mode at the start; small ones suit very long dependencies.

    Raises:
        ValueError: a ``d_state`` below 1, a ring or phase that is none.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "nu_log": {"weight_decay": 0.0, "lr_scale": 0.25},
        "theta_log": {"weight_decay": 0.0, "lr_scale": 0.25},
        "gamma_log": {"weight_decay": 0.0, "lr_scale": 0.25},
        "B": {"weight_decay": 0.0, "lr_scale": 0.25},
        "D": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        d_state: int | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        modes = dim if d_state is None else d_state
        if modes < 1:
            raise ValueError(f"lru: d_state must be at least 1, got {modes}")
        if not 0 <= r_min < r_max <= 1 or not max_phase > 0:
            raise ValueError(
                f"lru: needs 0 <= r_min < r_max <= 1 and a phase above 0, got {r_min}, {r_max}, {max_phase}"
            )
        super().__init__(dim, causal=causal, modes=modes)
        self.ring, self.max_phase = (r_min, r_max), max_phase
        self.nu_log = nn.Parameter(torch.empty(modes))
        self.theta_log = nn.Parameter(torch.empty(modes))
        self.gamma_log = nn.Parameter(torch.empty(modes))
        self.out_proj = nn.Linear(dim, 2 * dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: modes in a ring, B and C after Glorot, D standard normal."""
        low, high = self.ring
        # 1 - u lies in (0, 1]: neither a mode of size 0 nor a phase of 0, whose logarithms are not finite.
        square = low**2 + (high**2 - low**2) * (1 - torch.rand(self.modes, dtype=torch.float64))
        square.clamp_max_(1 - 1e-12)
        self.nu_log.copy_((-0.5 * square.log()).log())
        self.theta_log.copy_((self.max_phase * (1 - torch.rand(self.modes, dtype=torch.float64))).log())
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        nn.init.normal_(self.B, std=(2 * self.dim) ** -0.5)
        nn.init.normal_(self.C, std=self.modes**-0.5)
        nn.init.normal_(self.D)

    def change_step(self, factor: float) -> None:
        """Another step of the system that the recurrence is the zero-order hold of: ``lambda^factor``, and ``B`` times ``(lambda^factor - 1) / (lambda - 1)``.

        The paper derives the LRU from no continuous system; taken is the one of least frequencies (phases within half a turn). ``gamma`` stays: ``sqrt(1 - |lambda|^2)`` of the new modes
        would keep the size of the states of white noise, and not what a signal that is smooth between tokens leaves in them.
        """
        real = -self.nu_log.double().exp()
        turn = torch.remainder(self.theta_log.double().exp() + math.pi, 2 * math.pi) - math.pi
        grown = _less_one(factor * real, factor * turn) / _less_one(real, turn)
        self.B.copy_(torch.view_as_real(torch.view_as_complex(self.B.double()) * grown[:, None]))
        self.nu_log.add_(math.log(factor))
        turn = torch.remainder(factor * turn, 2 * math.pi)
        self.theta_log.copy_(torch.where(turn > 0, turn, 2 * math.pi).log())

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        lam = torch.polar((-self.nu_log.to(dtype).exp()).exp(), self.theta_log.to(dtype).exp())
        scaled = self.gamma_log.to(dtype).exp()[:, None, None] * self.B.to(dtype)
        return lam, torch.view_as_complex(scaled), self.C.to(dtype)

    def finish(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(y), dim=-1)


@register_mixer(
    "s5",
    paper="Smith, Warrington & Linderman 2022, arXiv 2208.04933",
    bidirectional=True,
    continuous=True,
    note="proved against s5-pytorch, weights copied, and scipy's zero-order hold; Re Lambda < -1e-4",
)
class S5(_OneSystem):
    """The S5 layer.

    Args:
        dim: width D.
        causal: see the past, or both sides.
        d_state: P, twice the number of complex modes; ``None`` for ``dim``, one more where that is odd.
        blocks: copies of the initial eigenvalues, each of a HiPPO matrix of size ``d_state / blocks``.
        dt_min, dt_max: steps at the start are log-uniform between these.

    Raises:
        ValueError: a ``d_state`` that does not divide into blocks of even size, steps that are not 0 < dt_min <= dt_max.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "Lambda_re": {"weight_decay": 0.0, "lr_scale": 0.25},
        "Lambda_im": {"weight_decay": 0.0, "lr_scale": 0.25},
        "log_step": {"weight_decay": 0.0, "lr_scale": 0.25},
        "B": {"weight_decay": 0.0, "lr_scale": 0.25},
        "D": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        d_state: int | None = None,
        blocks: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        d_state = dim + dim % 2 if d_state is None else d_state
        if blocks < 1 or d_state < 2 or d_state % (2 * blocks):
            raise ValueError(f"s5: d_state {d_state} must divide into {blocks} blocks of even size (conjugate pairs)")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"s5: steps must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        super().__init__(dim, causal=causal, modes=d_state // 2)
        self.d_state, self.blocks, self.dt_range = d_state, blocks, (dt_min, dt_max)
        self.Lambda_re = nn.Parameter(torch.empty(self.modes))
        self.Lambda_im = nn.Parameter(torch.empty(self.modes))
        self.log_step = nn.Parameter(torch.empty(self.modes))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: HiPPO-N in blocks, B and C after LeCun in its eigenvectors' basis, D standard normal."""
        values, vectors = hippo_modes(self.d_state // self.blocks)
        self.Lambda_re.copy_(values.real.repeat(self.blocks))
        self.Lambda_im.copy_(values.imag.repeat(self.blocks))
        low, high = self.dt_range
        self.log_step.uniform_(math.log(low), math.log(high))
        basis = torch.block_diag(*[vectors] * self.blocks)  # (P, P / 2)
        b = torch.randn(self.d_state, self.dim, dtype=torch.float64) / math.sqrt(self.dim)
        self.B.copy_(torch.view_as_real(basis.mH @ b.to(basis.dtype)))
        c = torch.randn(*self.C.shape[:2], self.d_state, 2, dtype=torch.float64) / math.sqrt(self.d_state)
        self.C.copy_(torch.view_as_real(torch.view_as_complex(c) @ basis))
        nn.init.normal_(self.D)

    def change_step(self, factor: float) -> None:
        """Longer or shorter steps of the same system."""
        self.log_step.add_(math.log(factor))

    def discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        real, imag = self.Lambda_re.to(dtype).clamp_max(SLOWEST), self.Lambda_im.to(dtype)
        dt = self.log_step.to(dtype).exp()
        less_one = _less_one(dt * real, dt * imag)
        held = less_one / torch.complex(real, imag)
        return less_one + 1, held[:, None] * torch.view_as_complex(self.B.to(dtype)), 2 * self.C.to(dtype)

    def finish(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.out_proj(y))

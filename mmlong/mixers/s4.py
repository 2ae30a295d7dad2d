"""S4: a structured state space a channel, HiPPO's matrix as a diagonal and a term of rank one.

Follows Gu, Goel & Re 2021, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396). For every channel, with ``N`` state
numbers in the basis where the matrix is nearly diagonal and a step ``dt``:

    A = Lambda - P P*;   A_bar = (1 - dt A / 2)^-1 (1 + dt A / 2);   B_bar = (1 - dt A / 2)^-1 dt B        (bilinear)
    h_t = A_bar h_{t-1} + B_bar u_t;   y_t = C h_t + D u_t;   out = GLU(W gelu(y) + b)

``Lambda``, ``P`` and ``B`` start at HiPPO-LegS (:mod:`mmlong.mixers.hippo`), ``C`` is complex normal, and all are trained. The entries come in conjugate pairs, so a state is
``N / 2`` complex numbers: of these, as pairs of reals with ``<x, y> = sum_m Re(conj(x_m) y_m)``, the term of rank one is ``2 p <p, h>``, and with
``g = 1 / (1 - dt Lambda / 2)`` the inverse is, by Sherman & Morrison's formula,

    (1 - dt A / 2)^-1 = g - s (g p) <conj(g) p, .>,   s = dt / (1 + dt <p, g p>)

which makes one token ``O(N)`` work. The form with two sides has a second ``C``, whose kernel runs backwards over the tokens after the present one.
Departures: ``P P*`` in place of the first version's ``P Q*``, as in the authors' later code (Goel et al. 2022, arXiv 2202.09729, section 4: it cannot become unstable); the kernel is applied
in chunks by matrix products, in place of a Cauchy kernel and an FFT (:mod:`mmlong.ops.state_space`), which compute the same convolution.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.hippo import hippo_low_rank
from mmlong.mixers.state_space import KernelLayer, StateSpace
from mmlong.ops.chunked_system import plain
from mmlong.ops.diagonal import multiply
from mmlong.ops.state_space import state_space

CHUNK = 128
"""Tokens a chunk: states are carried by full matrices, which twice the tokens of a diagonal system's chunk halves."""


class Discrete(NamedTuple):
    """``A_bar h = turn h - left <right, h>``, and what goes in and out, all in pairs of reals ``(D, N / 2, 2)``; ``c (1 or 2, D, N / 2, 2)``."""

    turn: Tensor
    left: Tensor
    right: Tensor
    b: Tensor
    c: Tensor

    def transition(self) -> Tensor:
        """``A_bar`` as a matrix ``(D, N, N)``."""
        re, im = self.turn.unbind(-1)
        blocks = torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)  # (D, N / 2, 2, 2)
        matrix = torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)
        return matrix - self.left.flatten(1)[:, :, None] * self.right.flatten(1)[:, None]

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """The state ``(B, D, N / 2, 2)`` after one more token ``(B, D)``."""
        along = (self.right * h).sum((-1, -2), keepdim=True)
        return multiply(self.turn, h) - self.left * along + self.b * u[..., None, None]


@register_mixer(
    "s4",
    paper="Gu, Goel & Re 2021, arXiv 2111.00396",
    bidirectional=True,
    state="constant",
    cost="n",
    continuous=True,
    note="proved against scipy's bilinear rule and simulation, and the paper's kernel by Woodbury and Cauchy; P P* for P Q*; chunks in place of an FFT",
)
class S4(KernelLayer):
    """The S4 layer.

    Args:
        dim: width D, one state space a channel.
        causal: see the past, or both sides with two kernels.
        d_state: N, even.
        dt_min, dt_max: steps at the start are log-uniform between these.
        chunk: tokens a chunk; ``None`` for ``CHUNK``.

    Raises:
        ValueError: an odd or non-positive ``d_state``, a chunk below 1, steps that are not 0 < dt_min <= dt_max.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        **StateSpace.optim_hints,
        "P": {"weight_decay": 0.0, "lr_scale": 0.1},
        "B": {"weight_decay": 0.0, "lr_scale": 0.1},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        d_state: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            dim, causal=causal, name="s4", d_state=d_state, init="legs", dt_min=dt_min, dt_max=dt_max, chunk=chunk
        )
        self.P = nn.Parameter(torch.empty(dim, d_state // 2, 2))
        self.B = nn.Parameter(torch.empty(dim, d_state // 2, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """HiPPO-LegS; D is standard normal."""
        super().reset_parameters()
        _, p, b = hippo_low_rank(self.d_state)
        self.P.copy_(torch.view_as_real(p).expand_as(self.P))
        self.B.copy_(torch.view_as_real(b).expand_as(self.B))

    def discretise(self, dtype: torch.dtype) -> Discrete:
        """The bilinear rule, by the opening lines of this file; ``dtype`` is real."""
        dt = self.log_dt.to(dtype).exp()[:, None]
        half = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype)) * (dt / 2)
        p, b = torch.view_as_complex(self.P.to(dtype)), torch.view_as_complex(self.B.to(dtype))
        g = 1 / (1 - half)
        gp, dual = g * p, g.conj() * p
        s = dt / (1 + dt * (p.conj() * gp).real.sum(-1, keepdim=True))
        into = dt * (g * b - s * gp * (dual.conj() * b).real.sum(-1, keepdim=True))
        c = self.C.to(dtype) * self.C.new_tensor([2.0, -2.0], dtype=dtype)
        turn, left, right, b = (torch.view_as_real(t.resolve_conj()) for t in ((1 + half) * g, 2 * s * gp, dual, into))
        return Discrete(turn, left, right, b, c)

    def run(
        self,
        x: Tensor,
        system: Discrete,
        side: int,
        h: Tensor | None,
        layout: Layout | None,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor]:
        c = system.c[side]
        if x.shape[1] == 1 and plain(layout):
            before = x.new_zeros(x.shape[0], *c.shape, dtype=c.dtype) if h is None else h
            after = system.step(before, x[:, 0].to(c.dtype))
            return (c * (before if strict else after)).sum((-1, -2))[:, None].to(x.dtype), after
        flat = None if h is None else h.flatten(2)
        A, b = system.transition(), system.b.flatten(1)
        y, after = state_space(x, A, b, c.flatten(1), flat, layout, strict, self.chunk or CHUNK)
        return y, after.unflatten(2, c.shape[1:])

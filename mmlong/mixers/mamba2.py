"""Mamba-2: a selective state space with one scalar decay a head, run as chunked linear attention.

Follows Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), the block of its section 7:

    z, (x, B, C), dt = W_in u                        one projection
    x, B, C = silu(short causal convolution)         width 4, depthwise
    dt = softplus(dt + bias);  A = -exp(A_log)       one of each a head
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;   y_t = S_t C_t + D x_t
    out = W_out RMSNorm(y * silu(z))                 a norm per group

``B`` and ``C`` are shared by the heads of a group. Departures: the state size defaults to 64 (the paper trains 128 and 64), less for narrow mixers; ``dt`` is
not clamped above. The work of a block of tokens is done while it is in the cache (:mod:`mmlong.ops.blockwise`).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.ssd import at_least_one, choose_widths, discretise, init_steps, init_taps
from mmlong.mixers.state import State
from mmlong.ops.blockwise import blockwise
from mmlong.ops.gated_norm import gated_rms_norm
from mmlong.ops.kv_cache import ragged
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.linear_attention_backends import LINEAR_ATTENTION
from mmlong.ops.short_conv import short_conv

BLOCK_ELEMENTS = 1 << 21
"""Elements of projected tokens in a block, unless that were fewer than ``BLOCK_TOKENS``."""

BLOCK_TOKENS = 4096
"""Fewer tokens in a block would spend the time on calls."""


@register_mixer(
    "mamba2",
    paper="Dao & Gu 2024, arXiv 2405.21060",
    state="constant",
    cost="n",
    note="proved against transformers' Mamba-2 mixer, weights copied; d_state 64 by default, smaller below dim 64",
)
class Mamba2(Mixer):
    """The Mamba-2 mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: inner width over ``dim``.
        d_state: columns N of a head's state; ``None`` for 64, or ``dim`` down to 8 where that is less.
        headdim: channels P of a head; ``None`` for 64, or the inner width where that is less or not divisible.
        ngroups: groups of heads that share B and C, and of channels that share a norm.
        d_conv: taps of the short convolution.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.
        backend: of the recurrence; see ``mmlong doctor``. ``portable`` keeps convolution and norm to plain torch as well.

    Raises:
        ValueError: an inner width, head width and number of groups that do not divide each other, or a size below 1.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "A_log": {"weight_decay": 0.0},
        "dt_bias": {"weight_decay": 0.0},
        "D": {"weight_decay": 0.0},
        "norm_weight": {"weight_decay": 0.0},
        "conv_bias": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        expand: float = 2,
        d_state: int | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        d_conv: int = 4,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if backend != "auto":
            LINEAR_ATTENTION[backend]  # an unknown name is refused now, not at the first batch
        self.backend, self.side = backend, "portable" if backend == "portable" else "auto"
        widths = choose_widths("mamba2", dim, expand, d_state, headdim, ngroups)
        at_least_one("mamba2", d_conv=d_conv, chunk=chunk)
        inner, self.d_state = widths.inner, widths.d_state
        self.inner, self.headdim, self.heads = inner, widths.headdim, widths.heads
        self.ngroups, self.d_conv, self.chunk, self.norm_eps = ngroups, d_conv, chunk, norm_eps
        self.conv_dim = inner + 2 * ngroups * self.d_state
        self.in_proj = nn.Linear(dim, inner + self.conv_dim + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: dt log-uniform in [1e-3, 1e-1], A uniform in [-16, -1], the convolution as torch's."""
        init_taps(self.conv_weight, self.conv_bias)
        init_steps(self.dt_bias)
        self.A_log.copy_(torch.empty(self.heads).uniform_(1, 16).log())

    def state_bytes(self, length: int) -> int:
        return 4 * ((self.d_conv - 1) * self.conv_dim + self.heads * self.headdim * self.d_state)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, _ = x.shape
        if state is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            tail = x.new_zeros(B, self.d_conv - 1, self.conv_dim, dtype=dtype)
            ssm = x.new_zeros(B, self.heads, self.headdim, self.d_state, dtype=dtype)
        else:
            tail, ssm = state["conv"], state["ssm"]
        if L == 1 and self.backend == "auto" and not ragged(layout) and not torch.is_grad_enabled():
            return self._token(x, tail, ssm)
        tokens = max(BLOCK_TOKENS, BLOCK_ELEMENTS // self.in_proj.out_features)
        plain = x.device.type != "cpu" or torch.compiler.is_compiling() or tokens >= B * L
        if plain:
            y, (tail, ssm) = self._piece(x, (tail, ssm), self._weights(), layout)
            y = self.out_proj(y)
        else:
            piece = partial(self._piece, keep=True)
            y, (tail, ssm) = blockwise(piece, x, (tail, ssm), self._weights(), layout, tokens, self.out_proj.weight)
        return y, {"conv": tail, "ssm": ssm}

    def _token(self, x: Tensor, tail: Tensor, ssm: Tensor) -> tuple[Tensor, State]:
        """One token ``(B, 1, D)``, as it is drawn. Its time is that of the calls, so what a piece needs besides is left out; what it computes is what :meth:`_piece` does."""
        B, G, P, dtype = x.shape[0], self.ngroups, self.headdim, ssm.dtype
        z, u, dt = self.in_proj(x[:, 0]).to(dtype).split([self.inner, self.conv_dim, self.heads], -1)
        window = torch.cat([tail, u[:, None]], 1)
        u = F.silu((window * self.conv_weight.t()).sum(1).add_(self.conv_bias), inplace=True)
        v, k, q = u.split([self.inner, G * self.d_state, G * self.d_state], -1)
        v, dt = v.view(B, -1, P), F.softplus(dt + self.dt_bias)
        decay = torch.exp(-dt * self.A_log.exp())
        write = (v * dt[..., None]).view(B, G, -1, 1) * k.view(B, G, 1, -1)
        ssm = torch.addcmul(write.view(ssm.shape), ssm, decay[..., None, None])
        y = (ssm.view(B, G, -1, self.d_state) @ q.reshape(B, G, -1, 1)).view(v.shape)
        y = torch.addcmul(y, v, self.D[:, None]).view(B, 1, -1).to(x.dtype)
        y = gated_rms_norm(y, z[:, None], self.norm_weight, G, self.norm_eps, self.side)
        return self.out_proj(y), {"conv": window[:, 1:], "ssm": ssm}

    def _weights(self) -> tuple[Tensor, ...]:
        return (
            self.in_proj.weight,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm_weight,
        )

    def _piece(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        layout: Layout | None,
        keep: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Everything before the output projection."""
        w_in, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = weights
        tail, ssm = state
        # Three products instead of one and a split: each result has contiguous rows.
        w_gate, w_conv, w_dt = w_in.split([self.inner, self.conv_dim, self.heads])
        z, u, dt = F.linear(x, w_gate), F.linear(x, w_conv), F.linear(x, w_dt)
        u, tail = short_conv(u, conv_weight, conv_bias, tail, layout, "silu", self.side)
        v, k, q = u.split([self.inner, *[self.ngroups * self.d_state] * 2], dim=-1)
        g, log_dt = discretise(dt, dt_bias, A_log)
        # Only kernels for GPUs are parametrised by it.
        rate = None if x.device.type == "cpu" else -A_log.to(g.dtype).exp()
        y, ssm = scalar_decay_attention(
            q.unflatten(-1, (self.ngroups, -1)),
            k.unflatten(-1, (self.ngroups, -1)),
            v.unflatten(-1, (self.heads, -1)),
            g,
            log_dt,
            D,
            ssm,
            layout,
            self.chunk,
            keep=keep,
            rate=rate,
            backend=self.backend,
        )
        y = gated_rms_norm(y.flatten(2), z, norm_weight, self.ngroups, self.norm_eps, self.side)
        return y, (tail, ssm)

"""Log-linear Mamba-2: a state space with a scalar decay a head whose past is parted into the buckets of a Fenwick tree, each weighed by the token that reads.

Follows Guo et al. 2025, "Log-Linear Attention" (arXiv 2506.04761), its Mamba-2 form: Mamba-2 (Dao & Gu 2024, arXiv 2405.21060; :mod:`mmlong.mixers.mamba2`) with a weight for each level

    z, (x, B, C), dt = W_in u;   r = W_level u              r: one of each head and level
    x, B, C = silu(short causal convolution)                 width 4, depthwise
    dt = softplus(dt + bias);  A = -exp(A_log)               one of each a head
    w^(l) = softplus(scale^(l) r^(l))                        the authors' code; the paper asks for weights >= 0 that the token decides
    y_t = sum over s <= t of w_t^(level(t, s)) exp(A (dt_{s+1} + .. + dt_t)) (C_t . B_s) dt_s x_s + D x_t
    out = W_out RMSNorm(y * silu(z))                         a norm per group

The level of a pair is the place of the highest binary digit in which their indices in the document differ (:mod:`mmlong.ops.fenwick`), the paper's and its code's numbering.

Departures: as ``mamba2``, the state size defaults to 64 (the authors': 128), less for narrow mixers. The authors' number of levels follows from the longest sequence, here ``levels`` is fixed, 22 by default, and so is
the state's shape: one matrix for each level but the token's own, of which at any time those are zero whose digit of the count is. A document of more than ``2^(levels - 1)`` tokens (2 million) goes on, its last level
one bucket that is never merged. A reset begins a new count. Where there is a layout and several long rows, they go two at a time, which bounds the states kept between blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.blocks import BLOCK_TOKENS
from mmlong.mixers.cell import CellMixer, Tensors
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.ssd import at_least_one, choose_widths, init_steps, init_taps
from mmlong.mixers.state import State, rebuild_state, select_rows, state_tensors
from mmlong.ops.gated_norm import gated_rms_norm
from mmlong.ops.log_linear_attention import log_linear_attention
from mmlong.ops.short_conv import short_conv

ROWS = 2
"""Rows of a layout that go side by side through blocks of ``BLOCK_TOKENS``."""


@register_mixer(
    "log_linear",
    paper="Guo et al. 2025, arXiv 2506.04761",
    state="constant",
    cost="n log n",
    note="the Mamba-2 form; proved against fla-core's naive log-linear attention and its definition; levels are fixed (22), so the "
    "state is too: beyond 2^21 tokens of a document the last level is one bucket; d_state 64 by default, smaller below dim 64",
)
class LogLinear(CellMixer):
    """The log-linear Mamba-2 mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: inner width over ``dim``.
        d_state: columns N of a head's states; ``None`` for 64, or ``dim`` down to 8 where that is less.
        headdim: channels P of a head; ``None`` for 64, or the inner width where that is less or not divisible.
        ngroups: groups of heads that share B and C, and of channels that share a norm.
        d_conv: taps of the short convolution.
        levels: K, which tell apart the first ``2^(K - 1)`` tokens of a document.
        chunk: tokens a chunk of the op's fast form; ``None`` for its default.
        norm_eps: added to the mean square in the norm.

    Raises:
        ValueError: an inner width, head width and number of groups that do not divide each other, or another size that is too small.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "A_log": {"weight_decay": 0.0},
        "dt_bias": {"weight_decay": 0.0},
        "D": {"weight_decay": 0.0},
        "level_scale": {"weight_decay": 0.0},
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
        levels: int = 22,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        widths = choose_widths("log_linear", dim, expand, d_state, headdim, ngroups)
        at_least_one("log_linear", d_conv=d_conv, chunk=chunk)
        if not 2 <= levels <= 62:
            raise ValueError(f"log_linear: levels must be from 2 to 62, got {levels}")
        inner, self.d_state = widths.inner, widths.d_state
        self.inner, self.headdim, self.heads = inner, widths.headdim, widths.heads
        self.ngroups, self.d_conv, self.levels, self.chunk, self.norm_eps = ngroups, d_conv, levels, chunk, norm_eps
        self.conv_dim = inner + 2 * ngroups * self.d_state
        self.parts = [inner, self.conv_dim, self.heads]
        self.in_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.level_proj = nn.Linear(dim, self.heads * levels, bias=False)
        self.level_scale = nn.Parameter(torch.ones(self.heads, levels))
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.width = sum(self.parts) + self.heads * levels
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's initial values: dt log-uniform in [1e-3, 1e-1], A uniform in [-16, -1], the convolution as torch's."""
        init_taps(self.conv_weight, self.conv_bias)
        init_steps(self.dt_bias)
        self.A_log.copy_(torch.empty(self.heads).uniform_(1, 16).log())

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "conv": (self.d_conv - 1, self.conv_dim),
            "S": (self.heads, self.levels - 1, self.d_state, self.headdim),
        }

    def initial_state(self, x: Tensor) -> Tensors:
        return {**super().initial_state(x), "passed": torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)}

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + 8

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, _ = x.shape
        before = self.initial_state(x) if state is None else state
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().mix(x, before, layout)
        # Blocks carry floating-point tensors; a double counts as far as anyone's tokens go.
        before = {**before, "passed": before["passed"].double()}
        if layout is None or B <= ROWS or B * L <= BLOCK_TOKENS:
            y, after = super().mix(x, before, layout)
        else:
            some = [slice(b, b + ROWS) for b in range(0, B, ROWS)]
            found = [super(LogLinear, self).mix(x[r], select_rows(before, r), _rows(layout, r)) for r in some]
            y = torch.cat([part for part, _ in found])
            tensors = zip(*(state_tensors(part) for _, part in found), strict=True)
            after = rebuild_state(before, [torch.cat(parts) for parts in tensors])
        return y, {**after, "passed": after["passed"].detach().long()}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        z, u, dt = (F.linear(x, part) for part in w["in_proj.weight"].split(self.parts))
        u, tail = short_conv(u, w["conv_weight"], w["conv_bias"], state["conv"], layout, "silu")
        v, k, q = u.split([self.inner, *[self.ngroups * self.d_state] * 2], dim=-1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(dtype) + w["dt_bias"].to(dtype))  # (B, L, H)
        raw = F.linear(x, w["level_proj.weight"]).to(dtype).unflatten(-1, (self.heads, self.levels))
        v = v.unflatten(-1, (self.heads, -1))
        y, S, passed = log_linear_attention(
            q.unflatten(-1, (self.ngroups, -1)),
            k.unflatten(-1, (self.ngroups, -1)),
            v * dt[..., None],
            -dt * w["A_log"].to(dtype).exp(),
            F.softplus(raw * w["level_scale"].to(dtype)),
            state["S"],
            state["passed"].long(),
            layout,
            self.chunk,
        )
        y = torch.addcmul(y, v.to(dtype), w["D"].to(dtype)[:, None]).to(v.dtype).flatten(2)
        y = gated_rms_norm(y, z, w["norm_weight"], self.ngroups, self.norm_eps)
        return y, {"conv": tail, "S": S, "passed": passed.to(state["passed"].dtype)}


def _rows(layout: Layout, rows: slice) -> Layout:
    """The layout of some rows of the batch."""
    positions = layout.positions
    return replace(
        layout,
        lengths=None if layout.lengths is None else layout.lengths[rows],
        resets=None if layout.resets is None else layout.resets[rows],
        positions=positions if positions is None or positions.shape[0] == 1 else positions[rows],
    )

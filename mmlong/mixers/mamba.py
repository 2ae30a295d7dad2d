"""Mamba: a selective state space, whose step, writing and reading follow the token (S6).

Follows Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), the block of its section 3.4:

    u, z = W_in x;   u = silu(short causal convolution of u)         width 4, depthwise
    r, B, C = W_x u;   dt = softplus(W_dt r + bias)                  r of rank dim / 16
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;   y_t = C_t h_t + D u_t         N modes a channel, A = -exp(A_log)
    out = W_out (y * silu(z))

The second and third lines are :mod:`mmlong.mixers.selection`. Nothing departs from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.selection import Selection
from mmlong.mixers.state import State
from mmlong.ops.short_conv import short_conv


@register_mixer(
    "mamba",
    paper="Gu & Dao 2023, arXiv 2312.00752",
    note="proved against transformers' Mamba mixer and mambapy, weights copied",
)
class Mamba(Selection, Mixer):
    """The Mamba mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: inner width over ``dim``.
        d_state: modes N of a channel.
        dt_rank: rank of the step's projection; ``None`` for ``dim / 16``, rounded up.
        d_conv: taps of the short convolution.

    Raises:
        ValueError: sizes below 1.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        **Selection.optim_hints,
        "conv_bias": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        expand: float = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        d_conv: int = 4,
    ) -> None:
        super().__init__(dim, causal=causal)
        inner = round(expand * dim)
        rank = -(-dim // 16) if dt_rank is None else dt_rank
        if min(inner, d_state, rank, d_conv) < 1:
            raise ValueError(
                f"mamba: the inner width {inner} (expand x dim), d_state {d_state}, dt_rank {rank} and d_conv {d_conv} must be at least 1"
            )
        self.inner, self.d_conv = inner, d_conv
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.make_selection(inner, d_state, rank)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values; the convolution as torch's."""
        bound = self.d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        self.reset_selection()

    def state_bytes(self, length: int) -> int:
        return 4 * self.inner * (self.d_conv - 1 + self.d_state)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        tail, h = (None, None) if state is None else (state["conv"], state["ssm"])
        # Two products instead of one and a split: each result has contiguous rows.
        w_u, w_z = self.in_proj.weight.chunk(2)
        u, tail = short_conv(F.linear(x, w_u), self.conv_weight, self.conv_bias, tail, layout, "silu")
        y, h = self.select(u, h, layout)
        return self.out_proj(y * F.silu(F.linear(x, w_z))), {"conv": tail, "ssm": h}

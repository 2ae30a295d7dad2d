"""The selection mechanism of Mamba (S6): a step, a writing and a reading that follow the token, and the scan; a base of mixers and of parts of them.

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), sections 3.2 and 3.4, of inputs ``u``:

    r, B, C = W_x u;   dt = softplus(W_dt r + bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;   y_t = C_t h_t + D u_t         N modes a channel, A = -exp(A_log)

The recurrence is :mod:`mmlong.ops.selective_scan`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.ops.selective_scan import selective_scan


class Selection(nn.Module):
    """Its parameters, their initial values, and what they do. Subclasses call :meth:`make_selection`, then :meth:`reset_selection`."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "A_log": {"weight_decay": 0.0},
        "D": {"weight_decay": 0.0},
        "dt_bias": {"weight_decay": 0.0},
    }

    def make_selection(self, width: int, d_state: int, dt_rank: int) -> None:
        """Parameters for inputs of ``width`` channels, ``d_state`` modes each, and a step's projection of rank ``dt_rank``."""
        self.d_state, self.dt_rank = d_state, dt_rank
        self.x_proj = nn.Linear(width, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, width, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.A_log = nn.Parameter(torch.empty(width, d_state))
        self.D = nn.Parameter(torch.ones(width))

    @torch.no_grad()
    def reset_selection(self) -> None:
        """The paper's initial values: dt log-uniform in [1e-3, 1e-1], A at -1 .. -N (S4D-Real)."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))

    def select(self, u: Tensor, h: Tensor | None = None, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """``u (B, L, width)`` to ``(y, h)``; the state ``h (B, d_state, width)`` and ``layout`` as the scan has them."""
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dtype = torch.promote_types(u.dtype, torch.float32)
        dt = F.softplus(self.dt_proj(r).to(dtype) + self.dt_bias.to(dtype))
        return selective_scan(u, dt, -self.A_log.to(dtype).exp().t(), B, C, self.D, h, layout)

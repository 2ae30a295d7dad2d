"""HGRN: a gated recurrence of complex channels that turn at learned speeds, its forget gate bounded from below.

Follows Qin, Yang & Zhong 2023 (arXiv 2311.04823), section 3, over :mod:`mmlong.ops.scan`:

    c = silu(W_c x + b_c)                                                     complex, D channels
    a = l + (1 - l) sigmoid(W_a x + b_a)                                      real, D
    h_t = a_t exp(i theta) h_{t-1} + (1 - a_t) c_t                            theta learned, alike at every token
    out = W_o (norm([Re h, Im h]) * silu(W_g x + b_g))                        a layer norm over all 2 D numbers

``theta`` starts at the angles of rotary embeddings, ``10000^(-2 j / D)`` for the channels ``j``. Departures: norm and gate are in the order of the authors' code (the paper's formula gates first and
then normalises); the output projection has no bias. The lower bound ``l`` is learned over the layers of a stack, 0 in the first one; a mixer does not know its stack, so that it is an option, 0 by default.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.scan import scan

ANGLE_BASE = 10000.0


@register_mixer(
    "hgrn",
    paper="Qin et al. 2023, arXiv 2311.04823",
    note="proved against flash-linear-attention's recurrence in turning coordinates, and its definition in float64; the lower bound of the gates is an option, not learned",
)
class HGRN(CellMixer):
    """The HGRN mixer.

    Args:
        dim: width D, as many complex channels.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        lower_bound: smallest forget gate, in [0, 1); the paper's grows with the layer, from 0.
        norm_eps: of the output norm.

    Raises:
        ValueError: a bound outside [0, 1).
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"theta": {"weight_decay": 0.0}}

    def __init__(self, dim: int, *, causal: bool = True, lower_bound: float = 0.0, norm_eps: float = 1e-5) -> None:
        super().__init__(dim, causal=causal)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"hgrn: lower_bound must lie in [0, 1), got {lower_bound}")
        self.lower_bound, self.norm_eps = lower_bound, norm_eps
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.forget_proj = nn.Linear(dim, dim)
        self.gate_proj = nn.Linear(dim, 2 * dim)
        self.theta = nn.Parameter(torch.empty(dim))
        self.norm_weight = nn.Parameter(torch.ones(2 * dim))
        self.norm_bias = nn.Parameter(torch.zeros(2 * dim))
        self.out_proj = nn.Linear(2 * dim, dim, bias=False)
        self.width = 12 * dim
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial angles."""
        self.theta.copy_(ANGLE_BASE ** (-2 / self.dim * torch.arange(self.dim, dtype=torch.float64)))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"h": (self.dim, 2)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        u = linear(x, w, "in_proj")
        dtype = torch.promote_types(u.dtype, torch.float32)
        # A channel's two parts lie next to each other.
        c = F.silu(u.to(dtype)).unflatten(-1, (-1, 2))
        kept = self.lower_bound + (1 - self.lower_bound) * torch.sigmoid(linear(x, w, "forget_proj").to(dtype))
        theta = w["theta"].to(dtype)
        turn = torch.complex(theta.cos(), theta.sin())
        written = torch.view_as_complex((1 - kept)[..., None] * c)
        h, after = scan(kept * turn, written, torch.view_as_complex(state["h"]), layout)
        parts = torch.view_as_real(h).flatten(-2)
        normed = F.layer_norm(
            parts, parts.shape[-1:], w["norm_weight"].to(dtype), w["norm_bias"].to(dtype), self.norm_eps
        )
        y = normed * F.silu(linear(x, w, "gate_proj").to(dtype))
        return y.to(u.dtype), {"h": torch.view_as_real(after)}

"""RWKV-7, "Goose": a matrix state a head that decays by channel, erases in one direction and writes in another.

Follows Peng et al. 2025 (arXiv 2503.14456), section 4, and the authors' code. With ``d = x_{t-1} - x_t``, the token's difference to the one before, and ``x_i = x + d * mu_i`` for
``i = r, w, k, v, a, g``:

    r, k, v = W_r x_r, W_k x_k, W_v x_v
    log w = -e^(-1/2) sigmoid(w_0 + tanh(x_w A_w) B_w);   a = sigmoid(a_0 + x_a A_a B_a);   g = sigmoid(x_g A_g) B_g
    kappa = k * xi, of length one a head;   k' = k * (1 + (a - 1) * alpha)
    S_t = (Diag(w) - (a * kappa) kappa^T) S_{t-1} + k' v^T;   y = S_t^T r                       (N x N)
    out = W_o ((norm(y) + (r . (rho * k')) v) * g)                                              a layer norm a head

The transition is two steps of the delta rule (:mod:`mmlong.ops.delta_rule`): decay, erase at ``Diag(w)^{-1} kappa`` and write nothing along ``a * kappa``; then write ``v`` along ``k'`` and erase nothing. No
decay is below ``exp(-0.607)``, so that what is divided by is not small.

Departures: values are not drawn towards the first layer's, which a mixer does not see: every layer is as the paper's first. The output norm starts at one in every layer.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.delta import unit
from mmlong.ops.delta_rule import delta_product
from mmlong.ops.token_shift import token_shift

MIXED = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""What the token and the one before it are mixed for, and the power of the channel's place by which the weights start."""

FASTEST = math.exp(-0.5)
"""Rate of the fastest decay."""


def default_rank(dim: int, factor: float) -> int:
    """The authors' rank of a map from a token: about ``factor sqrt(dim)``, in steps of 32."""
    return max(32, round(factor * dim**0.5 / 32) * 32)


@register_mixer(
    "rwkv7",
    paper="Peng et al. 2025, arXiv 2503.14456",
    note="proved against flash-linear-attention's recurrence with the layer around it written out; no residual of the first layer's values",
)
class RWKV7(CellMixer):
    """The RWKV-7 time mixing.

    Args:
        dim: width D, of keys and values too.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for about 64 channels a head.
        decay_rank, rate_rank, gate_rank: ranks of the maps from a token to decays ``w``, rates ``a`` and gates ``g``; ``None`` for the authors' choice by ``dim``.
        depth: this layer's place in its stack, from 0, the first, to 1, the last; initial values depend on it.
        chunk: steps a chunk of the recurrence's fast form, two a token, a power of two; ``None`` chooses by the sizes.
        norm_eps: of the output norm; ``None`` for 1e-5 times the channels of a head.

    Raises:
        ValueError: a width that does not divide into the heads, a rank below 1, or a depth outside [0, 1].
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        name: {"weight_decay": 0.0}
        for name in ("mix_share", "decay_base", "rate_base", "erase_scale", "rate_share", "bonus")
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        gate_rank: int | None = None,
        depth: float = 0.0,
        chunk: int | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        decay_rank = default_rank(dim, 2.5) if decay_rank is None else decay_rank
        rate_rank = default_rank(dim, 2.5) if rate_rank is None else rate_rank
        gate_rank = default_rank(dim, 5) if gate_rank is None else gate_rank
        if min(decay_rank, rate_rank, gate_rank) < 1 or not 0 <= depth <= 1:
            raise ValueError(
                f"rwkv7: decay_rank {decay_rank}, rate_rank {rate_rank} and gate_rank {gate_rank} must be at least 1, and "
                f"depth {depth} in [0, 1]"
            )
        self.heads = heads_of("rwkv7", heads, round(dim / 64), channels=dim)
        self.N, self.depth, self.chunk = dim // self.heads, depth, chunk
        self.norm_eps = 1e-5 * self.N if norm_eps is None else norm_eps
        self.mix_share = nn.Parameter(torch.empty(len(MIXED), dim))
        self.decay_base = nn.Parameter(torch.empty(dim))
        self.decay_down = nn.Linear(dim, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, dim, bias=False)
        self.rate_base = nn.Parameter(torch.empty(dim))
        self.rate_down = nn.Linear(dim, rate_rank, bias=False)
        self.rate_up = nn.Linear(rate_rank, dim, bias=False)
        self.gate_down = nn.Linear(dim, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, dim, bias=False)
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.erase_scale = nn.Parameter(torch.empty(dim))
        self.rate_share = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(self.heads, self.N))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 24 * dim
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: mixing, decays and rates by channel and depth, and nothing from the token yet; nothing comes out."""
        D, N = self.dim, self.N
        channel = torch.arange(D) / D
        place = torch.arange(D) / max(D - 1, 1)
        inside = (torch.arange(D) % N) / max((N - 1) / 2, 0.5) - 1
        zigzag = inside * inside.abs()  # from -1 to 1 within each head
        for row, power in zip(self.mix_share, MIXED.values(), strict=True):
            row.copy_(1 - channel ** (power * (1 - self.depth)))
        self.decay_base.copy_(-5.5 + 6 * place ** (1 + self.depth**0.3) + 2.5 * zigzag)
        self.rate_base.copy_(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
        self.erase_scale.copy_(0.71 - 0.1 * (place - 0.5))
        nn.init.constant_(self.rate_share, 1.02)
        nn.init.constant_(self.bonus, -0.04)
        for down, up in ((self.decay_down, self.decay_up), (self.rate_down, self.rate_up)):
            nn.init.zeros_(down.weight)
            nn.init.orthogonal_(up.weight, 0.1)
        nn.init.zeros_(self.gate_down.weight)
        nn.init.orthogonal_(self.gate_up.weight, 0.1)
        for projection, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -size * D**-0.5, size * D**-0.5)
        nn.init.zeros_(self.out_proj.weight)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"last": (self.dim,), "S": (self.heads, self.N, self.N)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        previous, last = token_shift(x, state["last"], layout)
        change = previous - x
        mixed = {name: torch.addcmul(x, change, mu) for name, mu in zip(MIXED, w["mix_share"], strict=True)}
        r, k, v = linear(mixed["r"], w, "r_proj"), linear(mixed["k"], w, "k_proj"), linear(mixed["v"], w, "v_proj")
        dtype = torch.promote_types(r.dtype, torch.float32)
        low = linear(torch.tanh(linear(mixed["w"], w, "decay_down")), w, "decay_up")
        g = -FASTEST * torch.sigmoid(low.to(dtype) + w["decay_base"].to(dtype))
        low = linear(linear(mixed["a"], w, "rate_down"), w, "rate_up")
        a = torch.sigmoid(low.to(dtype) + w["rate_base"].to(dtype))
        gate = linear(torch.sigmoid(linear(mixed["g"], w, "gate_down")), w, "gate_up")
        r, wide, v, g, a = (t.unflatten(-1, (self.heads, -1)) for t in (r, k.to(dtype), v, g, a))
        kappa = unit(wide * w["erase_scale"].to(dtype).view(self.heads, -1))
        key = wide * (1 + (a - 1) * w["rate_share"].to(dtype).view(self.heads, -1))
        y, S = delta_product(
            r,
            torch.stack([a * kappa, key], 2),
            torch.stack([torch.zeros_like(v), v], 2),
            torch.ones_like(key[..., 0]).unsqueeze(2).expand(-1, -1, 2, -1),
            g,
            torch.stack([kappa * (-g).exp(), torch.zeros_like(kappa)], 2),
            state["S"],
            layout,
            self.chunk,
            keep=True,
        )
        normed = F.layer_norm(y.to(dtype), (self.N,), eps=self.norm_eps).flatten(2)
        normed = torch.addcmul(w["norm_bias"].to(dtype), normed, w["norm_weight"].to(dtype))
        own = (r.to(dtype) * key * w["bonus"].to(dtype)).sum(-1, keepdim=True) * v
        return ((normed + own.flatten(2)) * gate).to(y.dtype), {"last": last, "S": S}

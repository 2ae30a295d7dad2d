"""RWKV-6, "Finch": a matrix state a head under decays that depend on the token, read before the token is written, which has a weight of its own.

Follows Peng et al. 2024 (arXiv 2404.05892), section 4.2, and the authors' code. With ``d = x_{t-1} - x_t``, the token's difference to the one before:

    x_i = x + d * (mu_i + tanh((x + d * mu) A_i) B_i)               for i = w, k, v, r, g; A_i to rank 32
    r, k, v = W_r x_r, W_k x_k, W_v x_v;   w = exp(-exp(w_0 + tanh(x_w A) B))             A to rank 64
    y_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t;   S_t = Diag(w_t) S_{t-1} + k_t v_t^T      (mmlong.ops.gated_linear_attention)
    out = W_o (norm(y) * silu(W_g x_g))                             a layer norm a head

Departures: the projections start as torch's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.gated_linear_attention import gated_linear_attention
from mmlong.ops.token_shift import token_shift

MIXED = ("w", "k", "v", "r", "g")
"""What the token and the one before it are mixed for: decay, key, value, receptance (query) and gate."""

STEEPEST = 10.0
"""Log of the fastest rate of decay; faster ones could overflow, and nothing is left at e^-22026 either."""


@register_mixer(
    "rwkv6",
    paper="Peng et al. 2024, arXiv 2404.05892",
    note="proved against flash-linear-attention's recurrence with the layer around it written out; projections start as torch's",
)
class RWKV6(CellMixer):
    """The RWKV-6 time mixing.

    Args:
        dim: width D, of keys and values too.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for about 64 channels a head.
        mix_rank: rank of the map from a token to its mixing weights.
        decay_rank: rank of the map from a token to its decays.
        depth: this layer's place in its stack, from 0, the first, to 1, the last; initial values depend on it.
        chunk: tokens a chunk of the recurrence's fast form, a power of two; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: a width that does not divide into the heads, a rank below 1, or a depth outside [0, 1].
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "mix_each": {"weight_decay": 0.0},
        "bonus": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        depth: float = 0.0,
        chunk: int | None = None,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        if mix_rank < 1 or decay_rank < 1 or not 0 <= depth <= 1:
            raise ValueError(
                f"rwkv6: mix_rank {mix_rank} and decay_rank {decay_rank} must be at least 1, and depth {depth} in [0, 1]"
            )
        self.heads = heads_of("rwkv6", heads, round(dim / 64), channels=dim)
        self.N, self.depth, self.chunk, self.norm_eps = dim // self.heads, depth, chunk, norm_eps
        self.mix_base = nn.Parameter(torch.empty(dim))
        self.mix_each = nn.Parameter(torch.empty(len(MIXED), dim))
        self.mix_down = nn.Linear(dim, len(MIXED) * mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(len(MIXED), mix_rank, dim))
        self.decay_base = nn.Parameter(torch.empty(dim))
        self.decay_down = nn.Linear(dim, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, dim, bias=False)
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.bonus = nn.Parameter(torch.empty(self.heads, self.N))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 14 * dim + len(MIXED) * mix_rank
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: mixing, decay and bonus by channel and depth, and nothing from the token yet."""
        channel = torch.arange(self.dim) / self.dim
        place = torch.arange(self.dim) / max(self.dim - 1, 1)
        here = 1 - channel ** (1 - self.depth)
        self.mix_base.copy_(here)
        self.mix_each.copy_(here)
        self.mix_each[MIXED.index("v")] -= 0.3 * self.depth
        for name in ("r", "g"):
            self.mix_each[MIXED.index(name)] = 1 - channel ** (0.5 * (1 - self.depth))
        self.decay_base.copy_(-6 + 5 * place ** (0.7 + 1.3 * self.depth))
        zigzag = ((torch.arange(self.dim) + 1) % 3 - 1) * 0.1
        self.bonus.copy_((self.depth * (1 - place) + zigzag).view_as(self.bonus))
        for down in (self.mix_down, self.decay_down):
            nn.init.zeros_(down.weight)
        for up in (self.mix_up, self.decay_up.weight):
            nn.init.uniform_(up, -0.01, 0.01)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"last": (self.dim,), "S": (self.heads, self.N, self.N)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        previous, last = token_shift(x, state["last"], layout)
        change = previous - x
        low = torch.tanh(linear(torch.addcmul(x, change, w["mix_base"]), w, "mix_down")).chunk(len(MIXED), dim=-1)
        mixed = {
            name: torch.addcmul(x, change, mu + some @ up)
            for name, mu, some, up in zip(MIXED, w["mix_each"], low, w["mix_up"], strict=True)
        }
        raw = w["decay_base"] + linear(torch.tanh(linear(mixed["w"], w, "decay_down")), w, "decay_up")
        g = -raw.to(torch.promote_types(raw.dtype, torch.float32)).clamp_max(STEEPEST).exp()
        r, k, v = linear(mixed["r"], w, "r_proj"), linear(mixed["k"], w, "k_proj"), linear(mixed["v"], w, "v_proj")
        r, k, v, g = (t.unflatten(-1, (self.heads, -1)) for t in (r, k, v, g))
        y, S = gated_linear_attention(r, k, v, g, w["bonus"], state["S"], layout, self.chunk, keep=True)
        gate = F.silu(linear(mixed["g"], w, "gate_proj"))
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = F.layer_norm(y.to(dtype), (self.N,), eps=self.norm_eps).flatten(2)
        normed = torch.addcmul(w["norm_bias"].to(dtype), wide, w["norm_weight"].to(dtype))
        return (normed * gate).to(y.dtype), {"last": last, "S": S}

"""Multi-head latent attention: keys and values of all heads are made of one small vector of each token, which is all that is kept.

Follows DeepSeek-V2 (2024, arXiv 2405.04434), section 2.1. With ``c`` of ``kv_rank`` channels and a rotary key ``r`` of ``rope_dim``, which all heads share:

    c_t = RMSNorm(W_c x_t);   r_t = turned W_r x_t                               what is cached
    k_t = [W_k c_t ; r_t],   v_t = W_v c_t                                      of each head
    q_t = [W_q u_t ; turned W_p u_t],   u_t = x_t, or RMSNorm(W_u x_t) of ``q_rank`` channels
    y = W_o softmax(q k^T / sqrt(nope_dim + rope_dim)) v

Keys and values need not be made. ``q . W_k c = (W_k^T q) . c``, so queries can be taken to the cache, which is then keys and values of one group of ``kv_rank + rope_dim`` channels, and what is read of it is taken through ``W_v``
("absorbed"). That is more work for each pair and less for each key; it is done where queries are few, as in generation, and the rest is done with keys and values of each head.

The state is ``c (B, 1, S, kv_rank)`` and ``r (B, 1, S, rope_dim)``; otherwise as in :mod:`mmlong.mixers.attention`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers.attention import CachedAttention, head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.ops.attention import attention
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import Visible


@register_mixer(
    "mla",
    paper="DeepSeek-AI 2024, arXiv 2405.04434",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="proved against transformers' DeepseekV3Attention, weights copied; rotary pairs are halves, not neighbours (rope_interleave=False there)",
)
class LatentAttention(CachedAttention):
    """Multi-head latent attention.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: heads; ``None`` for about one per 64 channels.
        nope_dim: channels of a head's query and key without a position; ``None`` for ``dim / heads``.
        rope_dim: channels of them that are turned, even; ``None`` for half as many.
        v_dim: channels of a head's value; ``None`` for ``nope_dim``.
        kv_rank: channels of what is cached of keys and values; ``None`` for ``4 nope_dim``, as in the paper.
        q_rank: channels that queries are made of; ``None`` for the token itself, as in DeepSeek-V2-Lite. (The paper's large model has ``12 nope_dim``.)
        rope_base: longest wavelength over 2 pi.
        bias: of the projections of tokens and of the output.
        dropout: probability with which an attention weight is dropped in training.
        backend: of the op; see ``mmlong doctor``.

    Raises:
        ValueError: sizes that do not divide or are not at least 1, or an odd ``rope_dim``.
    """

    caches = ("c", "r")
    placed = True

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        v_dim: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rope_base: float = 10000.0,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal, dropout=dropout, backend=backend)
        self.heads, _, self.nope_dim = head_sizes("mla", dim, heads, None, nope_dim)
        self.rope_dim = max(2, self.nope_dim // 4 * 2) if rope_dim is None else rope_dim
        self.v_dim = self.nope_dim if v_dim is None else v_dim
        self.kv_rank = 4 * self.nope_dim if kv_rank is None else kv_rank
        self.q_rank, self.rope_base = q_rank, rope_base
        if min(self.v_dim, self.kv_rank, 1 if q_rank is None else q_rank) < 1:
            raise ValueError(f"mla: v_dim {v_dim}, kv_rank {kv_rank} and q_rank {q_rank} must be at least 1")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"mla: rope_dim must be even and at least 2, got {rope_dim}")
        width = self.heads * (self.nope_dim + self.rope_dim)
        if q_rank is None:
            self.q_proj = nn.Linear(dim, width, bias=False)
        else:
            self.q_down = nn.Linear(dim, q_rank, bias=bias)
            self.q_norm = nn.RMSNorm(q_rank, eps=1e-6)
            self.q_proj = nn.Linear(q_rank, width, bias=False)
        self.kv_down = nn.Linear(dim, self.kv_rank + self.rope_dim, bias=bias)
        self.kv_norm = nn.RMSNorm(self.kv_rank, eps=1e-6)
        self.kv_proj = nn.Linear(self.kv_rank, self.heads * (self.nope_dim + self.v_dim), bias=False)
        self.out_proj = nn.Linear(self.heads * self.v_dim, dim, bias=bias)

    @property
    def key_bytes(self) -> int:
        return 4 * (self.kv_rank + self.rope_dim)

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:
        """``q (B, heads, L, nope_dim + rope_dim)``, ``c`` and ``r``."""
        assert places is not None
        u = x if self.q_rank is None else self.q_norm(self.q_down(x))
        q = self.q_proj(u).unflatten(-1, (self.heads, -1))
        table = rotary_table(places, self.rope_dim, self.rope_base, x.dtype)
        still, turned = q.split([self.nope_dim, self.rope_dim], -1)
        q = torch.cat([still, rotate(turned, table)], -1)
        c, r = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)
        c, r = self.kv_norm(c)[:, None], rotate(r[:, :, None].contiguous(), table).transpose(1, 2)
        return q.transpose(1, 2), c.to(r.dtype), r

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        c, r = cached
        y = self.absorbed(q, c, r, visible) if self.few(q.shape[2]) else self.expanded(q, c, r, visible)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def few(self, L: int) -> bool:
        """Whether queries are so few that taking them to the cache is less work than making every key."""
        if torch.compiler.is_compiling():
            return False
        a_pair = 2 * self.kv_rank - self.nope_dim - self.v_dim
        return L * a_pair < self.kv_rank * (self.nope_dim + self.v_dim)

    def absorbed(self, q: Tensor, c: Tensor, r: Tensor, visible: Visible) -> Tensor:
        """What every head reads, ``(B, heads, L, v_dim)``, over the cache itself."""
        weight = self.kv_proj.weight.to(q.dtype).unflatten(0, (self.heads, -1))
        to_keys, to_values = weight.split([self.nope_dim, self.v_dim], 1)
        still, turned = q.split([self.nope_dim, self.rope_dim], -1)
        queries, keys = torch.cat([still @ to_keys, turned], -1), torch.cat([c, r], -1)
        read = self.over(queries, keys, c, visible)
        return read @ to_values.transpose(1, 2).to(read.dtype)

    def expanded(self, q: Tensor, c: Tensor, r: Tensor, visible: Visible) -> Tensor:
        """The same with keys and values of every head."""
        kv = self.kv_proj(c[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split([self.nope_dim, self.v_dim], -1)
        k = torch.cat([k, r.to(k.dtype).expand(-1, self.heads, -1, -1)], -1)
        # Torch's own kernels take values as wide as keys.
        short = k.shape[-1] - self.v_dim
        if short > 0:
            return self.over(q, k, F.pad(v, (0, short)), visible)[..., : self.v_dim]
        return self.over(q, k, v, visible)

    def over(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        scale = 1 / math.sqrt(self.nope_dim + self.rope_dim)
        return attention(q, k, v, visible, scale=scale, dropout=dropout, backend=self.backend)

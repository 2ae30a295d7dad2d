"""Differential attention: what one softmax sees, less what another sees.

Follows Ye et al. 2024, "Differential Transformer" (arXiv 2410.05258). A head has two queries and two keys and one value, twice as wide; ``lambda`` is one number of the layer:

    y = (softmax(q_1 k_1^T / sqrt(d)) - lambda softmax(q_2 k_2^T / sqrt(d))) v
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init
    out = W_o ((1 - lambda_init) RMSNorm(y))                 the norm head by head

so that noise which both have in common is taken away. Both softmaxes are heads of one call. Rotary positions, as in the paper.

The state is ``k (B, 2 kv_heads, S, head_dim)``, turned, both keys of a group side by side, and ``v (B, kv_heads, S, 2 head_dim)``; otherwise as in :mod:`mmlong.mixers.attention`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.mixers.attention import CachedAttention, head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.ops.attention import attention
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import Visible

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


@register_mixer(
    "diff_attention",
    paper="Ye et al. 2024, arXiv 2410.05258",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="lambda_init is an option (0.8), which the paper has rise with depth; proved against transformers' DiffLlamaAttention, weights copied",
)
class DiffAttention(CachedAttention):
    """Differential attention.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: pairs of softmaxes; ``None`` for about one per 128 channels.
        kv_heads: groups of keys and values, dividing ``heads``; ``None`` for as many.
        head_dim: channels of a query; ``None`` for ``dim / (2 heads)``.
        lambda_init: what ``lambda`` begins at. The paper takes ``0.8 - 0.6 exp(-0.3 (l - 1))`` in layer ``l`` from 1 on, and finds 0.8 in all of them as good.
        rope: turn queries and keys by their positions.
        rope_base: longest wavelength over 2 pi.
        norm_eps: of the heads' norm.
        bias: of the projections.
        backend: of the op; see ``mmlong doctor``.

    Raises:
        ValueError: sizes that do not divide, or a ``lambda_init`` outside [0, 1).
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {name: {"weight_decay": 0.0} for name in LAMBDAS}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        lambda_init: float = 0.8,
        rope: bool = True,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal, backend=backend)
        wide = None if head_dim is None else 2 * head_dim
        if heads is None and wide is None:
            heads = head_sizes("diff_attention", dim, None, kv_heads, None)[0]
            heads = heads // 2 if heads % 2 == 0 and heads // 2 % (kv_heads or 1) == 0 else heads
        self.heads, self.kv_heads, wide = head_sizes("diff_attention", dim, heads, kv_heads, wide)
        if wide % 2:
            raise ValueError(
                f"diff_attention: dim {dim} does not divide into {self.heads} heads of two queries: choose heads, or give head_dim"
            )
        if not 0 <= lambda_init < 1:
            raise ValueError(f"diff_attention: lambda_init must be in [0, 1), got {lambda_init}")
        self.head_dim, self.lambda_init = wide // 2, lambda_init
        self.placed, self.rope_base = rope, rope_base
        self.q_proj = nn.Linear(dim, self.heads * wide, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * wide, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * wide, bias=bias)
        self.out_proj = nn.Linear(self.heads * wide, dim, bias=bias)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(self.head_dim)) for _ in LAMBDAS
        )
        self.norm = nn.RMSNorm(wide, eps=norm_eps)

    @property
    def key_bytes(self) -> int:
        return 4 * 4 * self.kv_heads * self.head_dim

    def lambda_(self) -> Tensor:
        """The share of the second softmax, a number."""
        a, b, c, d = (getattr(self, name) for name in LAMBDAS)
        return torch.exp((a * b).sum()) - torch.exp((c * d).sum()) + self.lambda_init

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:
        """Queries ``(B, 2 heads, L, head_dim)``, those of a group's first key before those of its second; keys and values as cached."""
        q, k = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if places is not None:
            table = rotary_table(places, self.head_dim, self.rope_base, x.dtype)
            q, k = rotate(q, table), rotate(k, table)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        k, v = cached
        y = attention(q, k, v.repeat_interleave(2, 1), visible, backend=self.backend)
        first, second = y.unflatten(1, (self.kv_heads, 2, -1)).unbind(2)
        y = (first - self.lambda_().to(y.dtype) * second).flatten(1, 2).transpose(1, 2)
        return self.out_proj(((1 - self.lambda_init) * self.norm(y)).flatten(2))

"""Pooling attention in two levels: Poolingformer.

Follows Zhang et al. 2021 (arXiv 2105.04371), section 3. The first level is a sliding window; the second reads what the first made, over a larger window, whose keys and values are pooled:

    Y = softmax(q k^T / sqrt(d)) v                over |i - j| <= w1;   q, k, v = W x
    Q, K, V = W' Y
    K'_p, V'_p = pool(K, V around token ``stride p``, ``kernel`` of them)
    Z = softmax(Q K'^T / sqrt(d)) V'              over |i - stride p| <= w2
    out = W_o (Y + Z)

Pooling is the paper's best, a light dynamic convolution, whose weights the token in the middle gives,

    pool(u)_p = sum_m a_pm u_(stride p + m),      a_p = softmax(W_a u_(stride p)),      |m| <= kernel / 2

of keys and of values each with its own ``W_a``; or the mean. At the ends of a document it is over the tokens that there are. Positions are rotary in both levels, a pooled key's that of its middle; the paper's are
added to the tokens before the first layer, as ``rope=False`` leaves them. Both sides are seen: the paper's decoder has ordinary attention, so there is no causal form.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.attention import attention
from mmlong.ops.interval_attention import interval_part
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import Visible

POOLS = ("dynamic", "mean")


@register_mixer(
    "poolingformer",
    paper="Zhang et al. 2021, arXiv 2105.04371",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="levels stacked and summed as the paper's; pooled keys lie at multiples of the stride for all queries; RoPE is ours; proved against the definition: there is no package",
)
class Poolingformer(DocumentAttention):
    """Two-level pooling attention; other options as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Args:
        causal: must be ``False``.
        window: tokens seen to each side in the first level.
        pooled_window: the same of the second.
        kernel: tokens that are pooled, an odd number.
        stride: tokens from one pooled key to the next.
        pool: ``"dynamic"``, or ``"mean"``.

    Raises:
        ValueError: sizes below 1, an even kernel, a second window below the stride, or an unknown pool.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        window: int = 128,
        pooled_window: int = 512,
        kernel: int = 5,
        stride: int = 4,
        pool: str = "dynamic",
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        for option, n in (("window", window), ("kernel", kernel), ("stride", stride)):
            if n < 1:
                raise ValueError(f"Poolingformer: {option} must be at least 1, got {n}")
        if kernel % 2 == 0:
            raise ValueError(f"Poolingformer: kernel must be odd, to have a middle, got {kernel}")
        if pooled_window < stride:
            raise ValueError(f"Poolingformer: pooled_window {pooled_window} must be at least the stride {stride}, or a query may see nothing")  # fmt: skip
        if pool not in POOLS:
            raise ValueError(f"Poolingformer: pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.window, self.pooled_window = window, pooled_window
        self.kernel, self.stride, self.pool = kernel, stride, pool
        inner = self.heads * self.head_dim
        self.q2_proj = nn.Linear(inner, inner, bias=bias)
        self.k2_proj = nn.Linear(inner, inner, bias=bias)
        self.v2_proj = nn.Linear(inner, inner, bias=bias)
        if pool == "dynamic":
            self.k_pool = nn.Linear(inner, kernel, bias=False)
            self.v_pool = nn.Linear(inner, kernel, bias=False)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        L = x.shape[1]
        q, k, v = self.project(x)
        near = attention(q, k, v, Visible(self.window, self.window)).transpose(1, 2).flatten(2)
        q, k, v = (p(near) for p in (self.q2_proj, self.k2_proj, self.v2_proj))
        k, v = self.pooled(k, "k_pool"), self.pooled(v, "v_pool")
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        if self.rope:
            here = torch.arange(L, device=x.device)
            q, k = (
                rotate(t, rotary_table(places, self.head_dim, self.rope_base, x.dtype))
                for t, places in ((q, here), (k, here[:: self.stride]))
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        own = np.arange(L)[None]
        first = np.maximum(-((self.pooled_window - own) // self.stride), 0)
        stop = np.minimum((own + self.pooled_window) // self.stride + 1, k.shape[2])
        far, _ = interval_part(q, k, v, first, stop, 1 / math.sqrt(self.head_dim))
        both = near.unflatten(2, (self.heads, -1)).transpose(1, 2) + far
        return self.leave(both), None

    def pooled(self, t: Tensor, weights: str) -> Tensor:
        """``(N, P, C)`` of ``(N, T, C)``, one for every ``stride`` tokens; ``weights`` names the layer that gives them."""
        (_, T, _), half = t.shape, self.kernel // 2
        middle = torch.arange(0, T, self.stride, device=t.device)
        around = middle[:, None] + torch.arange(-half, half + 1, device=t.device)
        missing = (around < 0) | (around >= T)
        scores = t.new_zeros(1, *around.shape) if self.pool == "mean" else getattr(self, weights)(t[:, :: self.stride])
        shares = scores.masked_fill(missing, -math.inf).softmax(-1).to(t.dtype)
        # From one middle to the next the same place of the kernel is a stride further on.
        last = (len(middle) - 1) * self.stride
        line = F.pad(t, (0, 0, half, max(0, last + half + 1 - T)))
        parts = [shares[..., m, None] * line[:, m : m + last + 1 : self.stride] for m in range(self.kernel)]
        return torch.stack(parts).sum(0)

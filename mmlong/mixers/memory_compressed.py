"""Memory-compressed attention: keys and values shortened by a strided convolution.

Follows Liu et al. 2018 (arXiv 1801.10198, section 4.2.3): before softmax attention, a convolution of kernel 3 and stride 3 makes one key, and one value, of every three. Keys and values have a kernel each; queries are not shortened.

    k_c = conv_k(k_3c, k_3c+1, k_3c+2),   v_c likewise;      y_i = sum_c softmax(q_i . k_c / sqrt(d)) v_c

Causal, a query sees the blocks that are over, its own token's included if that ends one; and a learned key and value beside them, so that the first queries see something. Both-sided, the last block is filled up with zeros.
The state is the keys and values so far and the tokens of the open block.

The paper's model alternates such layers with local ones (``local``, or blocks of their own), which see the tokens that are not yet in a block.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.block_attention import Blocks, block_attention
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads

QUERIES, KEYS = 128, 64
"""Sides of the blocks that are computed."""


@register_mixer(
    "memory_compressed",
    paper="Liu et al. 2018, arXiv 1801.10198",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="proved against memory-compressed-attention (one kernel for keys and values, in groups, scores over sqrt(dim)), weights copied; a learned key and value for queries that see no block, as there",
    survey=(("Memory Compressed", ""),),
)
class MemoryCompressed(DocumentMixer):
    """Softmax attention over keys and values that a strided convolution has shortened.

    Args:
        dim: width D.
        causal: see only blocks that are over, or all.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        factor: tokens of a block: kernel and stride of the convolutions.
        grouped: each head's keys are made of its own alone, not of all channels.

    Raises:
        ValueError: sizes that do not divide, or are not at least 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        factor: int = 3,
        grouped: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("memory_compressed", dim, heads, None, head_dim)
        if factor < 1:
            raise ValueError(f"memory_compressed: factor must be at least 1, got {factor}")
        self.factor, self.inner = factor, self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, self.inner, bias=False)
        self.k_proj = nn.Linear(dim, self.inner, bias=False)
        self.v_proj = nn.Linear(dim, self.inner, bias=False)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.k_conv, self.v_conv = (_Compress(self.inner, factor, self.heads if grouped else 1) for _ in range(2))
        self.null_k = nn.Parameter(torch.zeros(self.inner))
        self.null_v = nn.Parameter(torch.zeros(self.inner))

    def slots(self, seen: int) -> dict[str, int]:
        blocks = seen // self.factor
        return {"open": seen % self.factor, "k": blocks, "v": blocks}

    def state_bytes(self, length: int) -> int:
        if not self.streaming:
            return 0
        return 4 * (self.dim * (length % self.factor) + 2 * self.inner * (length // self.factor))

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q = to_heads(self.q_proj(x), self.heads)
        after: Parts | None = None
        if self.causal:
            line = x if state is None else torch.cat([state["open"].to(x.dtype), x], 1)
            over = line.shape[1] // self.factor * self.factor
            k, v = self._compressed(line[:, :over])
            if state is not None:
                k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
            after = {"open": line[:, over:].clone(), "k": k, "v": v}
        else:
            k, v = self._compressed(F.pad(x, (0, 0, 0, -x.shape[1] % self.factor)))
        null_k, null_v = (
            t.view(self.heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1).to(k.dtype)
            for t in (self.null_k, self.null_v)
        )
        k, v = torch.cat([null_k, k], 2), torch.cat([null_v, v], 2)
        if self.causal and x.shape[1] > 1:
            y, _ = block_attention(q, k, v, blocks_over(past, x.shape[1], self.factor, x.device))
        else:
            y = cross_attention(q, k, v)
        return self.out_proj(from_heads(y)), after

    def _compressed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(N, heads, blocks, head_dim)`` of whole blocks of tokens."""
        k, v = (
            to_heads(conv(proj(x)), self.heads)
            for proj, conv in ((self.k_proj, self.k_conv), (self.v_proj, self.v_conv))
        )
        return k, v


class _Compress(nn.Module):
    """A convolution whose stride is its kernel, as a product: ``(N, blocks * factor, width)`` to ``(N, blocks, width)``."""

    def __init__(self, width: int, factor: int, groups: int) -> None:
        super().__init__()
        self.factor, self.groups = factor, groups
        some = width // groups
        bound = (factor * some) ** -0.5  # as torch's convolutions begin
        self.weight = nn.Parameter(torch.empty(groups, factor * some, some).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, self.factor)).unflatten(3, (self.groups, -1))
        found = blocks.permute(0, 3, 1, 2, 4).flatten(3) @ self.weight  # (N, groups, blocks, width / groups)
        return found.transpose(1, 2).flatten(2) + self.bias


def blocks_over(past: int, length: int, factor: int, device: torch.device) -> Blocks:
    """What ``length`` queries after ``past`` tokens see: key 0, and key ``c`` once the token ``factor c - 1``, the last of its block, has come."""
    last = np.minimum(np.arange(QUERIES, length + QUERIES, QUERIES), length) + past - 1
    first = np.arange(0, length, QUERIES) + past
    counts = -(-(1 + (last + 1) // factor) // KEYS)
    full = (1 + (first + 1) // factor) // KEYS
    total = 1 + (past + length) // factor
    # From the newest block of keys to the oldest, so that those not seen by all of the queries come first.
    keys = torch.from_numpy(counts)[:, None] - 1 - torch.arange(int(counts.max()))
    places = torch.arange(total, device=device) * factor - 1
    return Blocks(
        keys=keys.clamp_min(-1).to(device)[None, None],
        q_size=QUERIES,
        k_size=KEYS,
        sees=_is_over,
        q_places=torch.arange(past, past + length, device=device)[None, None],
        k_places=places.clamp_min(0)[None, None],
        counts=counts,
        masked=counts - full,
    )


def _is_over(i: Tensor, j: Tensor) -> Tensor:
    return j <= i

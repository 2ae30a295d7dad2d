"""Infini-attention: a causal softmax within segments, and a matrix that holds everything before them.

Follows Munkhdalai, Faruqui & Gopal 2024 (arXiv 2404.07143). With ``f(x) = elu(x) + 1``, a query of segment ``s`` reads

    y = g M_{s-1}^T f(q) / (f(q) . z_{s-1})  +  (1 - g) softmax over its own segment up to itself,        g = sigmoid(beta) of its head

and a segment that is complete is written, by sums or (``delta=True``) by what the memory does not know of it yet:

    M_s = M_{s-1} + sum_j f(k_j) v_j^T                  or   M_s = M_{s-1} + sum_j f(k_j) (v_j - M_{s-1}^T f(k_j) / (f(k_j) . z_{s-1}))^T
    z_s = z_{s-1} + sum_j f(k_j)

Positions turn queries and keys of the softmax, not of the memory. Nothing is in the first segment's memory, and what it reads there is zero. Segments count from the document's first token, so that pieces of any length give the same result; the state is ``M``, ``z`` and the keys
and values of the open segment.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.attention import attention
from mmlong.ops.elu_features import elu_features
from mmlong.ops.visible import Visible

LEAST = 1e-15
"""A sum of features that still says something: its inverse squared, which gradients have, is a float32."""


@register_mixer(
    "infini_attention",
    paper="Munkhdalai et al. 2024, arXiv 2404.07143",
    state="constant",
    cost="n",
    note="linear or delta=True; RoPE in the softmax (rope=False: none); segments count from the document's beginning; proved against the paper's equations, segment by segment, in float64",
)
class InfiniAttention(DocumentAttention):
    """Softmax within segments and a compressive memory.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        segment: tokens of a segment; the paper has 2,048.
        delta: write by the delta rule.
        heads, kv_heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not divide or are below 1.
    """

    name: ClassVar[str] = "infini_attention"
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"gate": {"weight_decay": 0.0}}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        segment: int = 256,
        delta: bool = False,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            bias=bias,
        )
        if segment < 1:
            raise ValueError(f"infini_attention: segment must be at least 1, got {segment}")
        self.segment, self.delta = segment, delta
        self.gate = nn.Parameter(torch.zeros(self.heads))

    def begin(self, seen: int) -> int:
        """Where the segment of the last of so many tokens begins."""
        return max(0, seen - 1) // self.segment * self.segment

    def slots(self, seen: int) -> dict[str, int]:
        n = seen - self.begin(seen)
        return {"k": n, "v": n}

    def state_bytes(self, length: int) -> int:
        memory = 4 * self.kv_heads * self.head_dim * (self.head_dim + 1)
        return self.kept_bytes(self.slots(length)["k"]) + memory if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        """Keys are kept as they are, and turned where a softmax meets them."""
        N, T, _ = x.shape
        size, end, start = self.segment, past + T, self.begin(past)
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            memory = k.new_zeros(N, self.kv_heads, self.head_dim, self.head_dim, dtype=dtype)
            total = k.new_zeros(N, self.kv_heads, 1, self.head_dim, dtype=dtype)
        else:
            memory, total = state["memory"], state["total"]
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        found: list[Tensor] = []
        begins = range(start, end, size)
        # Split, and not sliced one by one, whose gradients would each be as long as the piece.
        of_keys = [min(a + size, end) - a for a in begins]
        of_queries = [max(0, min(a + size, end) - max(a, past)) for a in begins]
        parts = zip(begins, q.split(of_queries, 2), k.split(of_keys, 2), v.split(of_keys, 2), strict=True)
        for a, queries, keys, values in parts:
            b = min(a + size, end)
            if queries.shape[2]:
                found.append(self._read(queries, keys, values, memory, total, a, max(a, past)))
            if b < end:
                memory, total = self._written(keys, values, memory, total)
        y = self.leave(found[0] if len(found) == 1 else torch.cat(found, 2))
        n = self.slots(end)["k"]
        kept = {"k": k[:, :, k.shape[2] - n :].clone(), "v": v[:, :, v.shape[2] - n :].clone()}
        return y, {**kept, "memory": memory, "total": total}

    def _read(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, total: Tensor, a: int, first: int) -> Tensor:
        """What queries from position ``first`` on read of their segment's keys, which begin at ``a``, and of the memory."""
        turned_q = self.turned(first, q.transpose(1, 2))[0].transpose(1, 2)
        turned_k = self.turned(a, k.transpose(1, 2))[0].transpose(1, 2)
        local = attention(turned_q, turned_k, v, Visible(None, 0))
        gate = torch.sigmoid(self.gate)[:, None, None]
        if a == 0:
            return (1 - gate).to(local.dtype) * local
        with torch.autocast(q.device.type, enabled=False):
            asked = elu_features(q.to(memory.dtype)).unflatten(1, (self.kv_heads, -1))
            known = (asked @ memory[:, :, None] / _some(asked @ total[:, :, None].mT)).flatten(1, 2)
        return torch.lerp(local.to(known.dtype), known, gate.to(known.dtype))

    def _written(self, k: Tensor, v: Tensor, memory: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The memory with a segment's keys and values in it."""
        with torch.autocast(k.device.type, enabled=False):
            keys, values = elu_features(k.to(memory.dtype)), v.to(memory.dtype)
            if self.delta:
                values = values - keys @ memory / _some(keys @ total.mT)
            return memory + keys.mT @ values, total + keys.sum(2, keepdim=True)


def _some(weight: Tensor) -> Tensor:
    """Sums of weights to divide by. Where there is as good as none, in an empty memory or of features that are all next to 0, next to nothing is divided by 1."""
    return torch.where(weight > LEAST, weight, 1)

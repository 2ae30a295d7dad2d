"""Memorizing attention: a local softmax, and one over the best of all keys before, looked up exactly.

Follows Wu et al. 2022, "Memorizing Transformers" (arXiv 2203.08913). Keys and queries have unit norm, head by head, and a learned scale ``t``. With ``a`` the first token of a query's segment of ``segment`` tokens, and ``m = a - near``:

    local    softmax over  t q_i . k_j,   m <= j <= i                      with positions: the segment and the ``near`` tokens before it, as Transformer-XL has them
    memory   softmax over  t q_i . k_j,   the ``topk`` largest of j < m    without positions, and without a gradient to what is remembered
    y        g memory + (1 - g) local,    g = sigmoid(b) of its head

What is remembered is never changed, so a token a million back is as near as one a thousand back. Nothing is read from an empty memory: zero. ``capacity`` keeps so many of the newest tokens; the search is exact, by products in blocks (:mod:`mmlong.ops.best_keys`), so the work is quadratic up to it. ``search: faiss`` leaves it to faiss (:mod:`mmlong.ops.nearest`), which is exact, too, in float32.

Departures: positions are rotary (``rope=False``: none), where the paper has T5's; segments count from the document's first token, so that pieces of any length give the same result; the gradient reaches the ``near`` tokens of earlier segments, where Transformer-XL's cache, which the paper uses, stops it. The paper has one such layer, near the top. The state is all keys, not turned, and values.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.mixers.selecting import so_far
from mmlong.ops.attention import attention
from mmlong.ops.best_keys import best_keys_attention
from mmlong.ops.found_keys import found_keys_attention
from mmlong.ops.nearest import require_search
from mmlong.ops.visible import Visible


@register_mixer(
    "memorizing",
    paper="Wu et al. 2022, arXiv 2203.08913",
    state="growing",
    cost="n^2",
    note="exact search; RoPE in the local part (rope=False: none); segments count from the document's beginning; a gradient to the near tokens of earlier segments; held against memorizing-transformers-pytorch, weights copied: its local attention and its attention to what is remembered, with the paper's gate between them where it has one softmax over both",
)
class Memorizing(DocumentAttention):
    """Local attention and the best of everything before.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        segment: tokens of a segment.
        near: tokens before it that are local, too.
        topk: remembered tokens that a query of a head attends to.
        capacity: tokens that are remembered, the newest; ``None`` for all.
        search: ``exact`` or ``faiss``, which must be installed (``mmlong[faiss]``) and works on a CPU.
        heads, kv_heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not divide or are too small, or an unknown search.
        ImportError: ``search: faiss`` without it.
    """

    name: ClassVar[str] = "memorizing"
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"gate": {"weight_decay": 0.0}, "scale": {"weight_decay": 0.0}}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        segment: int = 256,
        near: int = 256,
        topk: int = 32,
        capacity: int | None = None,
        search: str = "exact",
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim, causal=causal, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias
        )  # fmt: skip
        for option, n, least in (
            ("segment", segment, 1),
            ("near", near, 0),
            ("topk", topk, 1),
            ("capacity", capacity, 1),
        ):
            if n is not None and n < least:
                raise ValueError(f"memorizing: {option} must be at least {least}, got {n}")
        require_search(search)
        self.search = search
        self.segment, self.near, self.topk, self.capacity = segment, near, topk, capacity
        self.gate = nn.Parameter(torch.zeros(self.heads))
        # Scores of unit vectors lie within 1: at first they are spread like those of attention.
        self.scale = nn.Parameter(torch.full((self.heads,), float(self.head_dim) ** 0.5))

    @property
    def stops_gradient(self) -> bool:
        return True

    def oldest(self, seen: int) -> int:
        """The first token that a query after so many may ask for."""
        if self.capacity is None:
            return 0
        return max(0, max(0, seen) // self.segment * self.segment - self.near - self.capacity)

    def slots(self, seen: int) -> dict[str, int]:
        n = seen - self.oldest(seen)
        return {"k": n, "v": n}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(self.slots(length)["k"]) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        end, begin = past + x.shape[1], self.oldest(past)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = F.normalize(q, dim=-1) * self.scale[:, None, None].to(q.dtype)
        k, v, after = self.remembered(x, state, end)
        gate = torch.sigmoid(self.gate)[:, None, None].to(q.dtype)
        # Of the local part: the first key that each query sees, of those from the first segment's on.
        starts = torch.arange(past, end, device=x.device) // self.segment * self.segment
        low = max(0, past // self.segment * self.segment - self.near)
        first = (starts - self.near).clamp_min(0)[None] - low
        turned_q = self.turned(past, q.transpose(1, 2))[0].transpose(1, 2)
        turned_k = self.turned(low, k[:, :, low - begin :].transpose(1, 2))[0].transpose(1, 2)
        visible = Visible(self.segment - 1 + self.near, 0, first)
        local = attention(turned_q, turned_k, v[:, :, low - begin :], visible, scale=1.0)
        begins = range(past // self.segment * self.segment, end, self.segment)
        remembered: list[Tensor] = []
        # Split, and not sliced one by one, whose gradients would each be as long as the piece.
        for a, asked in zip(
            begins, q.split([min(a + self.segment, end) - max(a, past) for a in begins], 2), strict=True
        ):
            m = max(0, a - self.near)
            least = 0 if self.capacity is None else max(0, m - self.capacity)
            known = slice(least - begin, m - begin)
            keys, values = k[:, :, known].detach(), v[:, :, known].detach()
            if m <= least:
                remembered.append(0 * asked)
            elif self.search == "exact":
                remembered.append(best_keys_attention(asked, keys, values, self.topk, causal=False, scale=1.0))
            else:
                remembered.append(found_keys_attention(asked, keys, values, self.topk, search=self.search))
        y = torch.lerp(local, torch.cat(remembered, 2).to(local.dtype), gate.to(local.dtype))
        return self.leave(y), after

    def remembered(self, x: Tensor, state: Parts | None, end: int) -> tuple[Tensor, Tensor, Parts]:
        """Keys and values ``(N, G, S, head_dim)`` of the past and of tokens that end at ``end``, and what of them is kept."""
        k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, v = so_far(state, {"k": F.normalize(k, dim=-1), "v": v})
        n = self.slots(end)["k"]
        return k, v, {"k": k[:, :, k.shape[2] - n :].clone(), "v": v[:, :, v.shape[2] - n :].clone()}

    def absorb_document(self, x: Tensor, state: Parts | None, past: int, layout: Layout | None) -> Parts | None:
        return self.remembered(x, state, past + x.shape[1])[2]

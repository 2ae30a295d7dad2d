"""Perceiver AR: one causal cross-attention over the whole past, then deep causal parts over the last few tokens alone.

Follows Hawthorne et al. 2022 (arXiv 2202.07765). There the last ``N`` positions of a context are latents: each reads all tokens up to its own, once, and a stack of causal self-attention runs over the ``N``. Here every position is to have a result, and pieces are to give what the whole gives, so the latents stand on a fixed
grid: with ``C`` the chunk of ``N`` tokens, counted from the document's first, that position ``t`` is in, and ``s`` its first token,

    z_t = x_t + W_o Attention(LN_q(x_t); LN_kv(x_0), .., LN_kv(x_t));       h_t = z_t + FFN(LN(z_t))
    y_t = inner(h_s, .., h_t)_t                                              the inner parts see each chunk as a document of its own

For the context that ends a chunk this is the paper's model, exactly; every chunk is one of its examples, whose prefix is all that comes before, and the loss is on all of them (test: the paper's model run on each prefix). What departs: a position that is ``j``-th in its chunk has ``j`` latents and not ``N`` to run over, where
the paper, in generation, lets the latents fill up to ``N`` and then starts anew with fewer likewise, or recomputes all of them for each token. Rotary positions turn all channels of a head, the paper's a part of them; a feed-forward is the block's.

``dropout`` is the paper's cross-attention dropout: in training, each chunk sees of the tokens before it only a share ``1 - dropout``, drawn anew for each row and chunk, and all of its own; the work is as much less. The state is the keys and values of all tokens and what the inner parts have of the open chunk.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.backbone.feedforward import create_ffn
from mmlong.backbone.hierarchy import Within
from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.attention import attention
from mmlong.ops.visible import Visible


class PrefixAttention(DocumentAttention):
    """Causal attention whose queries and keys are normed apart, and that drops keys before a query's chunk in training.

    Args:
        dim: width D.
        chunk: N.
        heads: ``None`` for about one per 64 channels.
        dropout: share of the keys before a chunk that it does not see, in training.

    Raises:
        ValueError: heads that do not divide the width, or a rate that is no probability.
    """

    name: ClassVar[str] = "perceiver_ar"

    def __init__(self, dim: int, chunk: int, heads: int | None, dropout: float) -> None:
        super().__init__(dim, causal=True, heads=heads, head_dim=None, rope=True, rope_base=10000.0, bias=False)
        if not 0 <= dropout < 1:
            raise ValueError(f"perceiver_ar: dropout must be in [0, 1), got {dropout}")
        self.chunk, self.dropout = chunk, dropout
        self.norm_queries, self.norm_source = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": seen, "v": seen}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(length)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        asked, known = self.norm_queries(x), self.norm_source(x)
        q, k, v = (
            proj(t).unflatten(-1, (-1, self.head_dim))
            for proj, t in ((self.q_proj, asked), (self.k_proj, known), (self.v_proj, known))
        )
        q, k = self.turned(past, q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        dropped = self.training and self.dropout > 0
        y = self._dropped(q, k, v, past) if dropped else attention(q, k, v, Visible(None, 0))
        return self.leave(y), {"k": k, "v": v}

    def _dropped(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """Chunk by chunk: of the keys before it some, as many in every row, and its own."""
        end, found = k.shape[2], []
        start = past
        while start < end:
            first = start // self.chunk * self.chunk
            stop = min(first + self.chunk, end)
            kept = round((1 - self.dropout) * first)
            which = torch.rand(k.shape[0], first, device=k.device).argsort(1)[:, :kept].sort(1).values
            which = which[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            keys, values = (torch.cat([t.gather(2, which), t[:, :, first:stop]], 2) for t in (k, v))
            found.append(attention(q[:, :, start - past : stop - past], keys, values, Visible(None, 0)))
            start = stop
        return torch.cat(found, 2)


@register_part("perceiver_ar")
class PerceiverAR(Part):
    """A causal read of the whole past, and parts within chunks.

    Args:
        inner: the parts; causal and streaming.
        latents: N, tokens of a chunk.
        dim: width D.
        heads: of the read; ``None`` for about one per 64 channels.
        ratio: hidden width of its feed-forward over D.
        dropout: share of the tokens before a chunk that it does not see, in training.

    Raises:
        ValueError: sizes below 1 or that do not divide, a rate that is no probability, or parts that do not stream.
    """

    def __init__(
        self,
        inner: nn.Module,
        latents: int,
        dim: int,
        heads: int | None = None,
        ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(Within(inner, latents))
        if not inner.streaming:
            raise ValueError(
                "perceiver_ar is of parts that are causal and stream; these do not: use perceiver_io for both sides"
            )
        self.read = PrefixAttention(dim, latents, heads, dropout)
        self.norm, self.ffn = nn.LayerNorm(dim), create_ffn("mlp", dim, ratio)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        cache, within = (None, None) if state is None else (state["read"], state["within"])
        read, cache = self.read(x, cache, layout)
        assert self.ffn is not None
        z = x + read
        y, within = self.inner(z + self.ffn(self.norm(z)), within, layout)
        return y, {"read": cache, "within": within}

"""Efficient attention: one softmax over the channels of queries, another over the sequence of keys.

Follows Shen et al. 2018 (arXiv 1812.01243), for every head,

    y = softmax_channels(Q) (softmax_sequence(K)^T V)

Each channel of the keys is a distribution over the sequence that gathers one row of values, and each query is a mixture of those rows; the product in brackets is ``d x d``, whatever the length. Both sides are seen: a softmax over the sequence
knows its end, and the paper has no causal form.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.cross_attention import from_heads, to_heads


@register_mixer(
    "efficient_attention",
    paper="Shen et al. 2018, arXiv 1812.01243",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="the paper's softmax form; proved against linear-attention-transformer's two-sided attention (times the sqrt(d) that it divides by), weights copied",
)
class EfficientAttention(DocumentMixer):
    """Linear attention by two softmaxes.

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self, dim: int, *, causal: bool = False, heads: int | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("efficient_attention", dim, heads, None, head_dim)
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        k, v = self.k_proj(x).softmax(1), self.v_proj(x)
        gathered = to_heads(k, self.heads).mT @ to_heads(v, self.heads)  # (N, heads, d, d)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).softmax(-1)
        return self.out_proj(from_heads(q.transpose(1, 2) @ gathered)), None

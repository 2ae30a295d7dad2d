"""Hierarchical attention: H-Transformer-1D.

Follows Zhu & Soricut 2021 (arXiv 2107.11906). A token sees its own block and those beside it token by token, and what is farther away as averages of 2, 4, 8, ... tokens, the farther the more; the definition, and what is
seen at which level, is in :mod:`mmlong.ops.hierarchical_attention`::

    causal, blocks of 2 (a number is a level):
    0
    0 0
    0 0 0
    0 0 0 0
    1 1 0 0 0
    1 1 0 0 0 0
    1 1 1 1 0 0 0
    1 1 1 1 0 0 0 0

The causal form is that of the authors' decoder, where a cluster's query is its first token's, so that nothing later comes into it. The paper has no positions of its own; here they are rotary, turned before averages
are made, or none.

The state is, of each level, the averages that may still be seen: keys and values of the block before the running one and of as much of this as there is, and the query of the running cluster. It grows with the
logarithm of the length.
"""

from __future__ import annotations

from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.hierarchical_attention import (
    hierarchical_attention,
    hierarchical_attention_causal,
    kept,
    sampled,
)


@register_mixer(
    "h_transformer",
    paper="Zhu & Soricut 2021, arXiv 2107.11906",
    bidirectional=True,
    state="growing",
    cost="n",
    note=(
        "blocks and weights as in the authors' flaxformer, causal queries of clusters too (their first token's, so nothing leaks); RoPE is ours; proved against the definition, against dense attention "
        "where tokens of a cluster are alike, and against h-transformer-1d where its other blocks (siblings only) make no difference and its level-wise maxima are taken away"
    ),
)
class HTransformer(DocumentAttention):
    """Hierarchical attention; options but ``block`` as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Args:
        block: clusters of a block (the paper's ``N_r``), even; a token sees at least so many to each side exactly.

    Raises:
        ValueError: a block that is not even.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        block: int = 16,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        if block < 2 or block % 2:
            raise ValueError(f"HTransformer: block must be even and at least 2, got {block}: its halves are blocks too")
        self.block = block

    def slots(self, seen: int) -> dict[str, int]:
        line = sum(stop - first for first, stop in kept(seen, self.block))
        return {"q": sampled(seen, self.block), "k": line, "v": line}

    def state_bytes(self, length: int) -> int:
        return 4 * self.heads * self.head_dim * sum(self.slots(length).values()) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project(x, past)
        if not self.causal:
            return self.leave(hierarchical_attention(q, k, v, self.block)), None
        given = None if state is None else (state["q"], state["k"], state["v"])
        y, after = hierarchical_attention_causal(q, k, v, self.block, past, given)
        return self.leave(y), dict(zip(("q", "k", "v"), after, strict=True))

"""Top-k attention: a softmax over the ``k`` keys with the largest scores of each query.

Follows Gupta et al. 2021 (arXiv 2106.06899), section 2: for every head and query, the dense scores, of which all but the ``topk`` largest are set to minus infinity,

    T_i = the topk largest of q_i . k_j / sqrt(head_dim), over the keys that i may see;     y_i = softmax over T_i

with all the past to choose from when causal, everything when not. Every score is computed, so the work is quadratic; queries are taken a few at a time and scores computed again in the backward, so memory is linear
(:mod:`mmlong.ops.best_keys`). The paper applies the same to feed-forward layers, which is not done here; positions are rotary.

The state is the keys and values so far: a later query may choose any of them.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.selecting import SelectingAttention
from mmlong.ops.best_keys import best_keys_attention


@register_mixer(
    "topk",
    paper="Gupta et al. 2021, arXiv 2106.06899",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="the attention, not the feed-forward layers; proved against torch.topk and a masked softmax in float64",
)
class TopK(SelectingAttention):
    """Top-k attention; options but these as :class:`~mmlong.mixers.selecting.SelectingAttention`.

    Args:
        topk: keys of a query; of equal scores the first.

    Raises:
        ValueError: sizes that do not divide, or fewer than one.
    """

    name: ClassVar[str] = "topk"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        topk: int = 64,
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
        if topk < 1:
            raise ValueError(f"topk: topk must be at least 1, got {topk}")
        self.topk = topk

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project_all(x, state, past)
        y = self.leave(best_keys_attention(q, k, v, self.topk, causal=self.causal))
        return y, {"k": k, "v": v} if self.causal else None

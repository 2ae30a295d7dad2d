"""Sparse Transformer's two patterns: a stride, or summaries at fixed places.

Follows Child et al. 2019 (arXiv 1904.10509). With a stride ``l`` near the square root of the length a query sees of the order of ``l`` keys, in two sets, such that any token reaches any other in two steps. Each head sees both sets ("a merged head"), or, with
``split``, half of the heads see one and half the other ("multi-head"). The paper's third way, one set in each layer in turn, is not here.

The stride is fixed when a mixer is built, from the ``length`` it is meant for; of other lengths the work is ``n (l + n / l)``. Both mixers have a two-sided form as well: the same sets without causality. Positions are rotary in place of
the paper's learned row and column embeddings (``rope=False``: none).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.mixers.pattern_attention import PatternAttention
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.block_patterns import CAUSAL, LastOfBlocks, Pattern, SameBlock, Window
from mmlong.ops.strided_attention import strided_attention, strided_part


def _stride(name: str, stride: int | None, length: int) -> int:
    """The stride, or the square root of the length it is meant for."""
    if length < 1:
        raise ValueError(f"{name}: length must be at least 1, got {length}")
    found = max(2, round(math.sqrt(length))) if stride is None else stride
    if found < 2:
        raise ValueError(f"{name}: stride must be at least 2, got {stride}")
    return found


@register_mixer(
    "sparse_strided",
    paper="Child et al. 2019, arXiv 1904.10509",
    bidirectional=True,
    state="growing",
    cost="n sqrt n",
    note="strided factorised attention, merged heads or split=True, with RoPE (rope=False: none); the stride is fixed at construction, for the length given; proved against dense softmax in float64 under an explicit mask",
    survey=(("Sparse Transformer", ""),),
)
class SparseStrided(DocumentAttention):
    """The last ``l`` tokens, and every ``l``-th before them.

    First set ``i - l <= j <= i``, second ``(i - j) mod l = 0``; of stride 3, both::

        # . . . . . . .
        # # . . . . . .
        # # # . . . . .
        # # # # . . . .
        . # # # # . . .
        . . # # # # . .
        # . . # # # # .
        . # . . # # # #

    Two-sided, ``|i - j| <= l`` and the same second set.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        stride: l; ``None`` for the square root of ``length``, rounded.
        length: tokens it is meant for.
        split: half of the heads see the first set and half the second; else all see both.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not fit, or a single head to be split.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        stride: int | None = None,
        length: int = 16384,
        split: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        self.stride, self.split = _stride("SparseStrided", stride, length), split
        if split and self.heads < 2:
            raise ValueError(
                f"SparseStrided: split needs at least 2 heads, got {self.heads}: set heads, or split=False"
            )

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": seen, "v": seen}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(length) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project(x, past)
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        size, after = self.stride, 0 if self.causal else None
        near = 0 if self.causal else size
        if self.split:
            a, b = slice(0, self.heads // 2), slice(self.heads // 2, self.heads)
            y = torch.cat(
                [
                    strided_attention(q[:, a], k[:, a], v[:, a], left=size, right=near),
                    strided_attention(q[:, b], k[:, b], v[:, b], stride=size, right=after),
                ],
                1,
            )
        else:
            # Of the second set, what is not in the first: at least two strides away.
            parts = [strided_part(q, k, v, left=size, right=near), strided_part(q, k, v, stride=size, right=-2)]
            if not self.causal:
                parts.append(strided_part(q, k, v, stride=size, left=-2))
            y, _ = merge_parts(parts)
        return self.leave(y), {"k": k, "v": v} if self.causal else None


@register_mixer(
    "sparse_fixed",
    paper="Child et al. 2019, arXiv 1904.10509",
    bidirectional=True,
    state="growing",
    cost="n sqrt n",
    note="fixed factorised attention, merged heads or split=True (whose second half also sees each token's own key), with RoPE (rope=False: none); the stride is fixed at construction; proved against dense softmax in float64 under an explicit mask",
    survey=(("Sparse Transformer", ""),),
)
class SparseFixed(PatternAttention):
    """The query's own block of ``l``, and the last ``c`` tokens of every block.

    First set ``floor(j / l) = floor(i / l)``, second ``j mod l >= l - c``; of stride 4 and ``c`` 1, both::

        # . . . . . . . .
        # # . . . . . . .
        # # # . . . . . .
        # # # # . . . . .
        . . . # # . . . .
        . . . # # # . . .
        . . . # # # # . .
        . . . # # # # # .
        . . . # . . . # #

    Two-sided, all of the block, and the last ``c`` of all blocks. Of split heads those of the second set see their own key too: the paper's sets leave the first tokens without any. The causal state is the open block, and of the others the last ``c``.

    Args:
        summary: c, the last tokens of each block that later ones see; the paper has 8 to 32.
        backend: as :class:`~mmlong.mixers.pattern_attention.PatternAttention`; other options as :class:`SparseStrided`.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        stride: int | None = None,
        length: int = 16384,
        summary: int = 8,
        split: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        size = _stride("SparseFixed", stride, length)
        if not 1 <= summary <= size:
            raise ValueError(f"SparseFixed: summary must be from 1 to the stride {size}, got {summary}")
        block, lasts = SameBlock(size), LastOfBlocks(size, summary)
        sets: list[Pattern] = [block, lasts | Window(0, 0)] if split else [block | lasts]
        super().__init__(
            dim,
            causal=causal,
            patterns=[s & CAUSAL for s in sets] if causal else sets,
            # So that what is gathered of a block's last tokens is little else.
            sizes=(128, min(64, max(8, summary))),
            heads=heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            bias=bias,
            backend=backend,
        )
        self.stride, self.summary, self.split = size, summary, split

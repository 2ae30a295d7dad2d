"""Mixture of Block Attention: every head of every query attends to its own block and to the past blocks whose mean key it likes best.

Follows Lu et al. 2025 (arXiv 2502.13189), section 2, with blocks of 512 keys of which a query sees 3. For every head, with ``K_b`` the keys of block ``b``, whole and in the past, and ``c`` the block of query ``i``:

    g_ib = q_i . mean(K_b)                        for b < c;  later blocks never
    T_i  = the topk - 1 blocks with the largest g_ib                        of equals the first
    y_i  = softmax over the keys of T_i, all of them, and those of block c up to i itself

one softmax over all the keys selected. The own block is always among the ``topk``, as in the authors' code. Keys are averaged as they are multiplied, after the rotary turn. The gate passes no gradient.

Queries that chose the same block are taken together (:mod:`mmlong.ops.chosen_blocks`), as in the paper's algorithm 1; the own block is an interval; both are merged by their log sums. A query scores every past block, so the work grows with
``n^2 / block``, and with ``n topk block``; memory is linear. The paper's mixtures with dense attention, by layer or by stage of training, are a matter of the model.

The state is the keys and values so far: a later query may choose any of them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.selecting import SelectingAttention, stretches
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.chosen_blocks import chosen_blocks
from mmlong.ops.interval_attention import interval_part
from mmlong.ops.top import top_indices


@register_mixer(
    "moba",
    paper="Lu et al. 2025, arXiv 2502.13189",
    state="growing",
    cost="n^2",
    note="keys are averaged after the rotary turn, as in the authors' code; proved against its definition in float64, the selection by a loop over queries and heads",
)
class MoBA(SelectingAttention):
    """Mixture of Block Attention; options but these as :class:`~mmlong.mixers.selecting.SelectingAttention`.

    Args:
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        block: keys of a block.
        topk: blocks that a query sees, its own among them.

    Raises:
        ValueError: sizes that do not divide, or fewer than one.
    """

    name: ClassVar[str] = "moba"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        block: int = 512,
        topk: int = 3,
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
        for option, n in (("block", block), ("topk", topk)):
            if n < 1:
                raise ValueError(f"moba: {option} must be at least 1, got {n}")
        self.block, self.topk = block, topk

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project_all(x, state, past)
        scale = 1 / math.sqrt(self.head_dim)
        place = np.arange(past, past + x.shape[1])[None]
        parts = [interval_part(q, k, v, place // self.block * self.block, place + 1, scale)]
        if place[0, -1] >= self.block and self.topk > 1:
            chosen = past_blocks(q, k, self.block, self.topk - 1)
            parts.append(chosen_blocks(q, k, v, chosen, self.block, scale=scale))
        return self.leave(merge_parts(parts)[0]), {"k": k, "v": v}


@torch.no_grad()
@torch.compiler.disable
def past_blocks(q: Tensor, k: Tensor, block: int, most: int) -> Tensor:
    """The past blocks whose mean key fits a query best.

    Args:
        q: ``(B, H, L, D)``; the last query belongs to the last key.
        k: ``(B, G, S, D)``.
        block: keys of a block.
        most: blocks of a query.

    Returns:
        int64 ``(B, H, L, most)``; -1 where there are fewer past blocks.
    """
    (B, H, L, _), (G, S) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    n = S // block
    means = k[:, :, : n * block].to(dtype).unflatten(2, (n, block)).mean(3).transpose(2, 3)
    chosen = torch.full((B, H, L, most), -1, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for i, j in stretches(L, B * H * n):
            past = min(n, (S - L + j - 1) // block)
            if not past:
                continue
            asked = q[:, :, i:j].to(dtype).unflatten(1, (G, -1)).flatten(2, 3)
            scores = (asked @ means[..., :past]).view(B, H, j - i, past)
            own = torch.arange(S - L + i, S - L + j, device=q.device) // block
            later = torch.arange(past, device=q.device) >= own[:, None]
            chosen[:, :, i:j] = top_indices(scores.masked_fill_(later, -math.inf), most)
    return chosen

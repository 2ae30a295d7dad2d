"""Softmax attention over a pattern of positions: who sees whom is a function, and only blocks that have a pair are computed.

Definition, with ``p_i`` the positions of queries and ``t_j`` those of keys, of a document that comes in pieces:

    y_i = sum_{j: sees(p_i, t_j)} exp(s_ij) v_j / sum of the same exp(s_ij);     s_ij = q_i . k_j / sqrt(D)

(:mod:`mmlong.ops.block_patterns`; block-sparse attention as Child et al. 2019, arXiv 1904.10509.)

| backend | what | where |
|---|---|---|
| `mask` | SDPA under an explicit mask | all; default for few pairs, and under a compiler |
| `blocks` | lists of blocks (:mod:`mmlong.ops.block_attention`), or intervals, where that is what is seen (:mod:`mmlong.ops.interval_attention`); memory linear in the length | all; default else |
| `flex` | FlexAttention, from the same lists | CUDA, by name; not yet run on one |
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.attention_backends import BLOCK, MASK_ELEMENTS, compiled_flex, flex_there
from mmlong.ops.backends import CUDA, Backend, Backends, Request
from mmlong.ops.block_attention import block_attention
from mmlong.ops.block_patterns import Pattern, blocks_of, flex_block_mask, places_of
from mmlong.ops.interval_attention import interval_attention

PATTERN_ATTENTION = Backends("pattern_attention")


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    past: int = 0,
    *,
    keeping: Pattern | None = None,
    q_size: int = 64,
    k_size: int = 64,
    backend: str = "auto",
) -> Tensor:
    """Attention over a pattern.

    Args:
        q: ``(B, H, T, D)``, at the positions ``past .. past + T - 1``.
        k, v: ``(B, G, S, D)``, G dividing H: of the past what ``keeping`` keeps, then the piece's own T.
        pattern: who sees whom; a query sees at least its own key.
        past: tokens before the piece.
        keeping: which keys of the past are there; ``None`` for all.
        q_size, k_size: sides of the blocks that are computed, where the backend leaves them open. The more edges of the pattern they meet, the less is computed in vain.
        backend: a name, or ``auto``.

    Returns:
        ``(B, H, T, D)``.

    Raises:
        BackendError: the backend is unknown or cannot do this.
    """
    (B, H, T, _), S = q.shape, k.shape[2]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = B * H * T * S <= MASK_ELEMENTS or torch.compiler.is_compiling()
    request = Request(q.device.type, q.dtype, backward=grad)
    chosen = PATTERN_ATTENTION.choose(request, backend, ("mask",) if few else ("blocks",))
    out: Tensor = chosen.run(q, k, v, pattern, past, keeping, q_size, k_size)
    return out


def _mask(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: int, keeping: Pattern | None, q_size: int, k_size: int
) -> Tensor:
    T = q.shape[2]
    places = torch.from_numpy(places_of(T, past, keeping)).to(q.device)
    seen = pattern.sees(places[len(places) - T :, None], places)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1])


@torch.compiler.disable
def _blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: int, keeping: Pattern | None, q_size: int, k_size: int
) -> Tensor:
    T = q.shape[2]
    bounds, places = pattern.interval(np.arange(past, past + T)), places_of(T, past, keeping)
    if bounds is not None and places[-1] - places[0] + 1 == len(places):
        first, stop = (np.clip(edge, places[0], places[-1] + 1)[None] - places[0] for edge in bounds)
        return interval_attention(q, k, v, first, stop, q.shape[3] ** -0.5)
    blocks = blocks_of(pattern, T, past, keeping=keeping, q_size=q_size, k_size=k_size, device=q.device)
    return block_attention(q, k, v, blocks)[0]


def _flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, past: int, keeping: Pattern | None, q_size: int, k_size: int
) -> Tensor:
    # Its kernels have sizes of their own.
    T, S = q.shape[2], k.shape[2]
    blocks = blocks_of(pattern, T, past, keeping=keeping, q_size=BLOCK, k_size=BLOCK, device=q.device)
    mask = flex_block_mask(blocks, T, S)
    out: Tensor = compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


PATTERN_ATTENTION.register(Backend("mask", _mask, automatic=False, note="default for few pairs, and under a compiler"))
PATTERN_ATTENTION.register(Backend("blocks", _blocks, note="default"))
PATTERN_ATTENTION.register(
    Backend("flex", _flex, devices=CUDA, available=flex_there, automatic=False, note="by name; not yet run on a GPU")
)

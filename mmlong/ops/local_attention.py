"""Sliding-window softmax attention, as a batch of blocks for torch's own kernels.

Definition, for every head, with windows ``l`` to the left and ``r`` to the right (Parmar et al. 2018, arXiv 1802.05751; Beltagy et al. 2020, arXiv 2004.05150):

    y_i = sum_j w_ij v_j,   w_i. = softmax_j(q_i . k_j / sqrt(D)) over  i - l <= j <= i + r

that is ``l + r + 1`` keys with its own, fewer at the ends of the sequence; ``r = 0`` is causal. Queries in blocks of ``c`` see keys in blocks of ``c + l + r``, and the band
within a block is the same for all blocks but those at the ends: one mask, one call on all of them. It copies each key ``(c + l + r) / c`` times, so on a CPU the tiles of
:mod:`mmlong.ops.tiled_attention` are faster (at 8,192 tokens of 4 heads of 64, window 512: 0.70 s against 0.48 s of processor time, forward and backward); this one
has no loop over the blocks, which suits GPUs and compilers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.visible import Visible

MIN_BLOCK = 64
"""Queries of a block at least, so that narrow windows do not make tiny products."""


def local_reference(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """The definition, one query at a time; over all keys; shapes as :func:`window_in_blocks`."""
    L, S = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    outputs = []
    for i in range(L):
        own = S - L + i
        seen = slice(max(0, own - left), own + right + 1)
        scores = (q[:, :, i, None] * k[:, :, seen]).sum(-1) / math.sqrt(q.shape[-1])
        outputs.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(-2))
    return torch.stack(outputs, 2)


def window_in_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float = 0.0) -> Tensor:
    """Attention within a window.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, G, S, D)``, G dividing H and S >= L: the last key belongs to the last query.
        v: ``(B, G, S, E)``.
        visible: the window; where rows differ, a mask of ``L (c + l + r)`` elements is made for each.
        dropout: probability with which a weight is dropped.

    Returns:
        ``(B, H, L, E)``.
    """
    L, S = q.shape[2], k.shape[2]
    left, right = (S if n is None else n for n in (visible.left, visible.right))
    past = S - L
    block = max(MIN_BLOCK, (left + right) // 2)
    # Blocks all of whose keys exist lie between these queries.
    head = -(-max(0, left - past) // block) * block
    tail = max(0, L - right) // block * block
    first, stop = visible.intervals(L, S, q.device)

    def part(i: int, j: int, a: int, b: int) -> Tensor:
        mask = _mask(first[:, i:j], stop[:, i:j], torch.arange(a, b, device=q.device))
        return _sdpa(q[:, :, i:j], k[:, :, a:b], v[:, :, a:b], mask[:, None], dropout)

    if tail <= head:
        return part(0, L, 0, S)
    parts = []
    if head:
        parts.append(part(0, head, 0, past + head + right))
    if not visible.ragged:
        # All blocks are alike.
        shown, rows = slice(head, head + block), 1
    else:
        shown, rows = slice(head, tail), q.shape[0]
    firsts, stops = (t[:, shown].expand(rows, -1).unflatten(1, (-1, block)).flatten(0, 1) for t in (first, stop))
    width = block + left + right
    starts = past + torch.arange(shown.start, shown.stop, block, device=q.device) - left
    places = starts.repeat(rows)[:, None, None] + torch.arange(width, device=q.device)
    mask = _mask(firsts, stops, places)[:, None]
    queries = q[:, :, head:tail].unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)
    seen = slice(past + head - left, past + tail + right)
    keys, values = (t[:, :, seen].unfold(2, width, block).movedim(2, 1).transpose(-1, -2).flatten(0, 1) for t in (k, v))
    y = _sdpa(queries, keys, values, mask, dropout)
    parts.append(y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3))
    if tail < L:
        parts.append(part(tail, L, past + tail - left, S))
    return torch.cat(parts, dim=2)


def _mask(first: Tensor, stop: Tensor, key: Tensor) -> Tensor:
    """Bool ``(N, queries, keys)`` of intervals ``(N, queries)``."""
    return (key >= first[..., None]) & (key < stop[..., None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])

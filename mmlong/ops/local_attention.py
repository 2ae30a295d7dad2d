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
    if torch.compiler.is_exporting():
        return _blocks_alike(q, k, v, visible, block, left, right, dropout)
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


def _blocks_alike(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, block: int, left: int, right: int, dropout: float
) -> Tensor:
    """The same for an exported program of any length: the ends are filled up, so that no block is a case of its own."""
    B, L, S = q.shape[0], q.shape[2], k.shape[2]
    first, stop = visible.intervals(L, S, q.device)
    n, width = (L + block - 1) // block, block + left + right
    if not isinstance(n, int):
        n += 1  # of an unknown number of blocks, 1 would be traced as a special case
    short, past = n * block - L, S - L
    # Keys from `left` before the first query's own to `right` after the last one's, those that there are not as zeros.
    before = F.pad(torch.stack([first, stop]), (0, short))
    places = torch.arange(n, device=q.device)[:, None] * block + torch.arange(width, device=q.device) + past - left
    there = (places >= 0) & (places < S)
    chosen = places.clamp_min(0).clamp_max(S - 1).flatten()
    keys, values = (t.index_select(2, chosen).unflatten(2, (n, width)).transpose(1, 2).flatten(0, 1) for t in (k, v))
    queries = F.pad(q, (0, 0, 0, short)).unflatten(2, (n, block)).transpose(1, 2).flatten(0, 1)
    firsts, stops = before.unflatten(-1, (n, block)).unbind(0)  # (B or 1, n, block)
    mask = (places[:, None] >= firsts[..., None]) & (places[:, None] < stops[..., None]) & there[:, None]
    # A query that fills up a block sees something, whatever it is: softmax over nothing is not a number.
    mask = mask | (firsts >= stops)[..., None]
    mask = mask.expand(B, -1, -1, -1).flatten(0, 1)[:, None]
    y = _sdpa(queries, keys, values, mask, dropout)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3).narrow(2, 0, L)


def _mask(first: Tensor, stop: Tensor, key: Tensor) -> Tensor:
    """Bool ``(N, queries, keys)`` of intervals ``(N, queries)``."""
    return (key >= first[..., None]) & (key < stop[..., None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])

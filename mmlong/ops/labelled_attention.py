"""Softmax attention to near keys, each distance with a vector of its own.

Definition, for every head, with a learned vector ``a_n`` for each distance ``-m <= n <= m`` (Shaw et al. 2018, arXiv 1803.02155, for keys):

    s_ij = scale q_i . (k_j + a_{j-i}),   |i - j| <= m;      y_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij);      l_i = log sum_j exp(s_ij)

Queries are taken in blocks of ``c``, with the ``c + 2 m`` keys around each. ``q_i . a_n`` is one product; its rows are moved from "by distance" to "by key" by the skew of Huang et al. 2018 (arXiv 1809.04281): a row of ``c + 2 m + 1`` numbers,
read in rows of ``c + 2 m``, starts one later each time. What lies outside the band is filled up so that it weighs nothing. Memory is that of ``c + 2 m`` scores a query and head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.tiled_attention import HIDDEN

BLOCK = 64
"""Queries c of a block."""


def labelled_part(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the ``m`` keys to each side of a query's own, to be merged with others.

    Args:
        q, k, v: ``(B, H, L, D)``.
        labels: ``(H, 2 m + 1, D)``, from distance ``j - i = -m`` to m.
        scale: of the scores.

    Returns:
        ``y (B, H, L, D)`` in at least float32 and ``log_sums (B, H, L)``.
    """
    L, m = q.shape[2], labels.shape[1] // 2
    c = min(BLOCK, L)
    n = -(-L // c)
    short = n * c - L
    wide = c + 2 * m
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        queries = F.pad(q * scale, (0, 0, 0, short)).unflatten(2, (n, c))
        keys, values = (F.pad(t, (0, 0, m, m + short)).unfold(2, wide, c) for t in (k, v))
        by_distance = queries.flatten(2, 3) @ labels.to(dtype).transpose(1, 2)
        rows = F.pad(by_distance.unflatten(2, (n, c)), (0, c), value=HIDDEN)
        skewed = rows.flatten(3)[..., : c * wide].unflatten(3, (c, wide))
        scores = queries @ keys + skewed
        place = torch.arange(-m, wide - m, device=q.device) + c * torch.arange(n, device=q.device)[:, None, None]
        scores = scores.masked_fill((place < 0) | (place >= L), HIDDEN)
        y = scores.softmax(-1) @ values.transpose(3, 4)
    return y.flatten(2, 3)[:, :, :L], scores.logsumexp(-1).flatten(2)[:, :, :L]

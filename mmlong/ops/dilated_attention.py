"""One dilation of LongNet's attention: within a segment, every ``rate``-th token to every ``rate``-th token.

Definition (Ding et al. 2023, arXiv 2307.02486), for head ``h`` with offset ``o = h mod rate``: tokens at positions ``p = o mod rate`` see the keys at positions ``o mod rate`` in their segment of ``segment`` positions, counted from 0;
causal, those up to their own. Other tokens have no result.

The tokens that take part are taken out of the sequence, a part in ``rate`` of them; then each has an interval of keys (:mod:`mmlong.ops.interval_attention`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mmlong.ops.interval_attention import interval_part


def dilated_part(
    q: Tensor, k: Tensor, v: Tensor, segment: int, rate: int, causal: bool
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Attention of the tokens that take part.

    Args:
        q: ``(B, H, L, D)``; the last query has the position of the last key.
        k, v: ``(B, H, S, D)``, S >= L; the first key is the first of a segment.
        segment: positions of a segment, a multiple of ``rate``.
        rate: every how many.
        causal: see no later key.

    Returns:
        ``y (rows, D)`` in at least float32, ``log_sums (rows)``, and which rows of queries laid out as ``(B, L, H)`` these are, int64; of rate 1 ``y (B, H, L, D)``, ``log_sums (B, H, L)`` and ``None``: all.
    """
    (B, H, L, D), S = q.shape, k.shape[2]
    scale = 1 / math.sqrt(D)
    past, width = S - L, segment // rate
    if rate == 1:
        first, stop = _in_segments(np.arange(past, S)[None], width, S, causal)
        return *interval_part(q, k, v, first, stop, scale), None
    offset = (np.arange(H) % rate)[:, None]
    n, begin = -(-S // rate), past // rate
    keys_at = offset + rate * np.arange(n)
    queries_at = keys_at[:, begin:]
    first, stop = _in_segments(np.arange(begin, n)[None], width, (keys_at < S).sum(1)[:, None], causal)
    keys, values = (_taken(t, keys_at) for t in (k, v))
    y, log_sums = interval_part(_taken(q, queries_at - past), keys, values, first, stop, scale)
    # Of the first and the last stride, only what is among the queries.
    there = (queries_at >= past) & (queries_at < S)
    rows = np.arange(B)[:, None, None] * L * H + ((queries_at - past) * H + np.arange(H)[:, None])
    there, rows = np.broadcast_to(there, rows.shape).reshape(-1), rows.reshape(-1)
    y, log_sums = y.flatten(0, 2), log_sums.flatten()
    if not there.all():
        live = torch.from_numpy(np.flatnonzero(there)).to(q.device)
        y, log_sums = y.index_select(0, live), log_sums.index_select(0, live)
    return y, log_sums, rows[there]


def _in_segments(own: np.ndarray, width: int, end: int | np.ndarray, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """``(first, stop)`` of queries ``own``, within keys before ``end``."""
    first = own // width * width
    stop = np.minimum(own + 1 if causal else first + width, end)
    first, stop = np.broadcast_arrays(np.minimum(first, stop), stop)
    return np.ascontiguousarray(first), np.ascontiguousarray(stop)


def _taken(t: Tensor, positions: np.ndarray) -> Tensor:
    """Of ``(B, H, T, D)`` the tokens at ``positions (H, n)``, as ``(B H, 1, n, D)``; those beyond the ends are any."""
    B, H, T, D = t.shape
    index = np.clip(positions, 0, T - 1) * H + np.arange(H)[:, None]
    rows = t.transpose(1, 2).flatten(1, 2)
    taken = rows.index_select(1, torch.from_numpy(index.reshape(-1)).to(t.device))
    return taken.view(B * H, 1, -1, D)

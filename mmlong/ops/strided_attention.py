"""Softmax attention to every ``stride``-th key: a window that is dilated, or a column of a grid.

Definition, for every head, a query at position ``p`` seeing the keys at

    p - stride n,      -right <= n <= left,      and not before ``start``

(the second set of the strided Sparse Transformer, Child et al. 2019, arXiv 1904.10509; Longformer's dilated window, Beltagy et al. 2020, arXiv 2004.05150.) Tokens at the same place in their stride, taken together, see
each other densely; so they are made rows of their own, by a transpose, and each query has an interval of keys (:mod:`mmlong.ops.interval_attention`). Where there are fewer queries than the stride, only the keys that
they see are taken.

What comes out is a part: with its log sums it can be merged with others, if no key is in two. Where it is all that a query sees, :func:`strided_attention` makes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.interval_attention import interval_attention, interval_part


def strided_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int = 1,
    left: int | None = None,
    right: int | None = None,
    begin: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention to every ``stride``-th key around a query.

    Args:
        q: ``(B, H, L, D)``; the last query has the position of the last key.
        k, v: ``(B, G, S, D)``, G dividing H and S >= L.
        stride: positions from one key to the next.
        left, right: keys seen before a query's own and after it; ``None`` for all. Below 0 the nearest are left out: ``right = -2`` sees no key nearer than two strides before.
        begin: position of the first key.
        start: keys at positions before this are not seen.

    Returns:
        ``y (B, H, L, D)`` in at least float32, its tokens before its heads in memory, and ``log_sums (B, H, L)``, as :func:`mmlong.ops.interval_attention.interval_part`.
    """
    y, log_sums = _by_strides(interval_part, q, k, v, stride, left, right, begin, start)
    assert log_sums is not None
    return y, log_sums


def strided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int = 1,
    left: int | None = None,
    right: int | None = None,
    begin: int = 0,
) -> Tensor:
    """The same where there is no other part, ``y (B, H, L, D)`` like ``q``; ``left`` and ``right`` may not be below 0."""
    return _by_strides(_whole, q, k, v, stride, left, right, begin, 0)[0]


def _whole(q: Tensor, k: Tensor, v: Tensor, first: np.ndarray, stop: np.ndarray, scale: float) -> tuple[Tensor, None]:
    # Tokens that fill up a stride have no key; what they see does not matter.
    first = np.minimum(first, k.shape[2] - 1)
    return interval_attention(q, k, v, first, np.maximum(stop, first + 1), scale), None


def _by_strides(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    left: int | None,
    right: int | None,
    begin: int,
    start: int,
) -> tuple[Tensor, Tensor | None]:
    """``run`` over intervals of the tokens at each place of a stride."""
    (B, H, L, D), S = q.shape, k.shape[2]
    scale = 1 / math.sqrt(D)
    end = begin + S
    queries = np.arange(end - L, end)
    if stride == 1:
        first, stop = _intervals(queries[None], left, right, np.array([max(start, begin)]), np.array([end]))
        return run(q, k, v, first - begin, stop - begin, scale)
    # A token's place in its stride, and the number of the stride it is in.
    low, high = begin // stride, -(-end // stride)
    few = stride > L
    places = queries % stride if few else np.arange(stride)
    bounds = [-(-(edge - places) // stride) for edge in (max(start, begin), end)]
    if few:
        taken = np.clip(places[:, None] + stride * np.arange(low, high) - begin, 0, S - 1)
        index = torch.from_numpy(taken.reshape(-1)).to(q.device)
        keys, values = (
            t.index_select(2, index).unflatten(2, taken.shape).transpose(1, 2).flatten(0, 1) for t in (k, v)
        )
        rows = q.transpose(1, 2).reshape(B * L, H, 1, D)
        own = queries[:, None] // stride
    else:
        front, rear = int(queries[0]) % stride, high * stride - end
        rows = _by_place(q, front, rear, stride)
        keys, values = (_by_place(t, begin - low * stride, rear, stride) for t in (k, v))
        own = np.arange(queries[0] // stride, high)[None]
    first, stop = _intervals(own, left, right, *bounds)
    y, log_sums = run(rows, keys, values, first - low, stop - low, scale)
    # (B places, H, n, D) back in order
    y = y.unflatten(0, (B, -1)).permute(0, 3, 1, 2, 4).flatten(1, 2)
    y = (y if few else y[:, front : front + L]).transpose(1, 2)
    if log_sums is None:
        return y, None
    log_sums = log_sums.unflatten(0, (B, -1)).permute(0, 2, 3, 1).flatten(2)
    return y, log_sums if few else log_sums[..., front : front + L]


def _intervals(
    own: np.ndarray, left: int | None, right: int | None, least: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``(first, stop)``, int64 ``(rows, L)``, about numbers ``own (1 or rows, L)``, within ``least <= n < most (rows)``."""
    least, most = (np.broadcast_to(t[:, None], (len(t), own.shape[1])) for t in (least, most))
    first = least if left is None else np.clip(own - left, least, most)
    stop = most if right is None else np.clip(own + right + 1, least, most)
    return np.ascontiguousarray(first), np.ascontiguousarray(stop)


def _by_place(t: Tensor, front: int, rear: int, stride: int) -> Tensor:
    """``(B, H, L, D)``, filled up to whole strides, as ``(B stride, H, n, D)``."""
    t = t.transpose(1, 2)
    if front or rear:
        t = F.pad(t, (0, 0, 0, 0, front, rear))
    return t.unflatten(1, (-1, stride)).permute(0, 2, 3, 1, 4).flatten(0, 1)

"""Softmax attention, or one of several parts of it, each query over an interval of keys that is known from lengths alone.

Definition, for every head, with ``first_i <= j < stop_i`` the keys of query ``i`` in this part:

    s_ij = scale q_i . k_j;     y_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij);     l_i = log sum_j exp(s_ij)

A pattern that is no interval is often a few of them, of tokens in another order (:mod:`mmlong.ops.strided_attention`); the parts are merged by their ``l`` (:func:`mmlong.ops.block_attention.merge_parts`). Since the
intervals are numbers and not tensors, nothing waits for a device, and an export knows them.

On a CPU the part is computed in tiles (:mod:`mmlong.ops.tiled_attention`), elsewhere and in exports as lists of blocks (:mod:`mmlong.ops.block_attention`). Memory is linear in the length.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmlong.ops.block_attention import Blocks, block_attention
from mmlong.ops.tiled_attention import HIDDEN, tiled_attention, tiled_attention_part

BLOCK = 64
"""Side of the blocks in which devices other than a CPU compute."""


@torch.compiler.disable
def interval_part(
    q: Tensor, k: Tensor, v: Tensor, first: np.ndarray, stop: np.ndarray, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over an interval of keys for every query, to be merged with others.

    Args:
        q: ``(B, H, L, D)``; any strides.
        k, v: ``(B, G, S, D)``, G dividing H.
        first, stop: int64 ``(R, L)``, R dividing B, row ``b`` having those of ``b % R``; between 0 and S. An interval may be empty.
        scale: of the scores.

    Returns:
        ``y (B, H, L, D)`` in at least float32 and ``log_sums (B, H, L)``; where a query sees no key, a finite number and one so low that a merge weighs it with nothing.
    """
    first, stop = _rows(first, np.maximum(stop, first), q.shape[0])
    if not k.shape[2]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:3], HIDDEN, dtype=dtype)
    if _in_tiles(q):
        return tiled_attention_part(q, k, v, torch.from_numpy(first), torch.from_numpy(stop), scale)
    y, log_sums = block_attention(q, k, v, interval_blocks(first, stop, k.shape[2], q.device), scale=scale)
    return y.to(log_sums.dtype), log_sums


@torch.compiler.disable
def interval_attention(q: Tensor, k: Tensor, v: Tensor, first: np.ndarray, stop: np.ndarray, scale: float) -> Tensor:
    """The same where there is no other part: ``y (B, H, L, D)`` like ``q``. Log sums, which cost a tenth of the time, are not made; no interval may be empty."""
    first, stop = _rows(first, stop, q.shape[0])
    if _in_tiles(q):
        return tiled_attention(q, k, v, torch.from_numpy(first), torch.from_numpy(stop), scale)
    return block_attention(q, k, v, interval_blocks(first, stop, k.shape[2], q.device), scale=scale)[0]


def _in_tiles(q: Tensor) -> bool:
    return q.device.type == "cpu" and not torch.compiler.is_exporting()


def _rows(first: np.ndarray, stop: np.ndarray, B: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of ``B`` rows, or of one if all are alike."""
    if all((t == t[:1]).all() for t in (first, stop)):
        return np.ascontiguousarray(first[:1]), np.ascontiguousarray(stop[:1])
    return np.tile(first, (B // len(first), 1)), np.tile(stop, (B // len(stop), 1))


def interval_blocks(first: np.ndarray, stop: np.ndarray, S: int, device: torch.device | str = "cpu") -> Blocks:
    """The key blocks that intervals ``(R, L)`` over ``S`` keys touch."""
    R, L = first.shape
    n = -(-L // BLOCK)
    short = n * BLOCK - L
    live = stop > first
    # Queries without a key, and those that fill up the last block, touch no block.
    low = np.pad(np.where(live, first, S), ((0, 0), (0, short)), constant_values=S).reshape(R, n, BLOCK).min(-1)
    high = np.pad(np.where(live, stop, 0), ((0, 0), (0, short))).reshape(R, n, BLOCK).max(-1)
    low, high = low // BLOCK, -(-high // BLOCK)
    width = max(1, int((high - low).max()))
    keys = low[..., None] + np.arange(width)
    keys = np.where(keys < high[..., None], keys, -1)
    from_first, to_stop = (torch.from_numpy(np.ascontiguousarray(t).reshape(-1)).to(device) for t in (first, stop))

    def sees(i: Tensor, j: Tensor) -> Tensor:
        return (j >= from_first[i]) & (j < to_stop[i])

    places = torch.arange(R * L, device=device).view(R, 1, L)
    return Blocks(torch.from_numpy(keys)[:, None].to(device), BLOCK, BLOCK, sees, q_places=places)

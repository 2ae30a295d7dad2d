"""Means of every ``k`` neighbours along the sequence, of those that count, and back; the last group may be short.

Definition: ``means(x)_g = sum_{t in g} x_t / |g|``, ``g`` the valid tokens among ``k g .. k g + k - 1``; zeros where there are none; ``given(z)_t = z_{t // k}``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_means(x: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """``(B, L, D)`` to ``(B, ceil(L / k), D)``.

    Args:
        x: tokens, zeros where they do not count.
        k: of a group.
        valid: bool ``(B, L)``; ``None``: all count.
    """
    if k == 1:
        return x
    L = x.shape[1]
    total = F.pad(x, (0, 0, 0, -L % k)).unflatten(1, (-1, k)).sum(2)
    there = x.new_ones(1, L) if valid is None else valid.to(x.dtype)
    count = F.pad(there, (0, -L % k)).unflatten(1, (-1, k)).sum(2)
    return total / count.clamp_min(1)[..., None]


def given(z: Tensor, k: int, length: int) -> Tensor:
    """``(B, ceil(length / k), D)`` to ``(B, length, D)``: every group's vector to each of its tokens."""
    return z if k == 1 else z.repeat_interleave(k, 1)[:, :length]

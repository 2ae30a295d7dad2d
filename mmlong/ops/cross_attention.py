"""Softmax attention between two sets, everything seen that is no padding: many queries over few keys, or few over many.

Definition, for every head,

    y_i = sum_j exp(scale q_i . k_j) v_j / sum_j exp(scale q_i . k_j)

(Vaswani et al. 2017, arXiv 1706.03762). Landmarks, projected keys and learned latents all come down to it. The weights of ``m`` few and ``L`` many are ``m L`` numbers; none of them is kept, forward or
backward: torch's own kernel makes them in tiles, and again in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, valid: Tensor | None = None) -> Tensor:
    """Every query over all keys that count; memory linear in both.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, H, S, D)``, S >= 1.
        v: ``(B, H, S, D)``.
        scale: of the scores; ``None`` for ``1 / sqrt(D)``.
        valid: bool ``(B, S)``, the keys that count; ``None`` for all. The others must be finite, and their values too.

    Returns:
        ``(B, H, L, D)``, under autocast in its type; zeros in a row of which no key counts.
    """
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    if valid is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    some = valid.any(1)[:, None, None, None]
    # A row with nothing to see must see something to be finite.
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None] | ~some, scale=scale)
    return torch.where(some, y, 0)


def to_heads(t: Tensor, heads: int) -> Tensor:
    """``(B, L, H d)`` as ``(B, H, L, d)``, a view."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def from_heads(t: Tensor) -> Tensor:
    """The inverse of :func:`to_heads`."""
    return t.transpose(1, 2).flatten(2)

"""Softmax attention to a few keys that every query sees, on top of what it has seen already.

With ``y`` and ``l`` a query's result over other keys and the logarithm of its sum (:func:`mmlong.ops.block_attention.merge_parts`), and ``s_j = scale q . k_j`` for the few:

    l' = log(exp(l) + sum_j exp(s_j));      y' = exp(l - l') y + sum_j exp(s_j - l') v_j

with the largest of ``l`` and ``s_j`` taken off all of them first: ``l'`` itself, where it is large, is rounded by more than may be lost in an exponent.
Scores are made all at once: memory is that of a row of ``n`` scores for each query and head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_few_keys(
    part: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge a part with a few more keys, none of which is in it.

    Args:
        part: ``y (B, H, L, E)`` and log sums ``(B, H, L)`` over other keys.
        q: ``(B, H, L, D)``.
        k: ``(B, H, n, D)``.
        v: ``(B, H, n, E)``.
        scale: of the scores.
        extra: added to the scores, broadcast to ``(B, H, L, n)``.

    Returns:
        ``y`` and log sums over all, like those of ``part``.
    """
    y, log_sums = part
    scores = ((scale * q) @ k.transpose(-1, -2)).to(log_sums.dtype)
    if extra is not None:
        scores = scores + extra
    most = torch.maximum(log_sums, scores.amax(-1)).detach()
    share, weights = (log_sums - most).exp(), (scores - most[..., None]).exp()
    total = share + weights.sum(-1)
    y = y * (share / total)[..., None] + ((weights / total[..., None]).to(v.dtype) @ v).to(y.dtype)
    return y, most + total.log()

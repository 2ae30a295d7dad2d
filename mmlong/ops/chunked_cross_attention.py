"""Chunked cross-attention: tokens over what was found for a chunk before them, each over one chunk's.

Follows Borgeaud et al. 2021, "Improving language models by retrieving from trillions of tokens" (RETRO, arXiv 2112.04426). Positions are counted from 0, chunk ``u`` is those from ``u m`` to ``u m + m - 1``, and ``E_u`` is what was found for it, which is known when its last token is. Position ``i`` reads what was found for the latest
chunk that is complete with it, itself included:

    u(i) = floor((i + 1) / m) - 1                                  for i < m - 1 there is none
    y_i  = sum_{j in E_u(i)} exp(q_i . k_j / sqrt(D)) v_j / sum of the same exp

so that the last token of a chunk is the first to read of it, and the last but one of the next chunk the last: the offset of ``m - 1``. Nothing found, nothing read: zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_read(index: Tensor, m: int) -> Tensor:
    """``u(i)``, negative for none; ``index`` int64, positions in their document."""
    return torch.div(index + 1, m, rounding_mode="floor") - 1


def chunked_cross_attention_reference(q: Tensor, k: Tensor, v: Tensor, there: Tensor, which: Tensor) -> Tensor:
    """The definition, token by token; arguments and result as :func:`chunked_cross_attention`."""
    y = torch.zeros(*q.shape[:3], v.shape[4], dtype=q.dtype, device=q.device)
    for b, i in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[2])).tolist():
        u = int(which[b, i])
        if u >= 0 and bool(there[b, u].any()):
            seen = there[b, u]
            weights = (k[b, u][:, seen] @ q[b, :, i, :, None] / math.sqrt(q.shape[3])).softmax(1)
            y[b, :, i] = (weights * v[b, u][:, seen]).sum(1)
    return y


def chunked_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, which: Tensor, place: Tensor, m: int
) -> Tensor:
    """Every token over what was found for one chunk; memory linear in the tokens and in what was found.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, U, H, S, D)``, of each chunk.
        v: ``(B, U, H, S, E)``.
        there: bool ``(B, U, S)``, what counts of it.
        which: int64 ``(B, L)``, the chunk that a token reads; negative: none.
        place: int64 ``(B, L)`` below ``m``; no two tokens that read the same chunk have the same.
        m: tokens that read one chunk, at most.

    Returns:
        ``(B, H, L, E)`` like ``v``, zero where nothing is read.

    Raises:
        ValueError: shapes that do not fit.
    """
    (B, H, L, D), (U, S) = q.shape, there.shape[1:]
    if k.shape != (B, U, H, S, D) or v.shape[:4] != k.shape[:4] or which.shape != (B, L) or place.shape != (B, L):
        raise ValueError(
            f"chunked_cross_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, there {tuple(there.shape)} and which {tuple(which.shape)} "
            "must be (B, H, L, D), (B, U, H, S, D), (B, U, H, S, E), (B, U, S) and (B, L)"
        )
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    y = torch.zeros(B, L, H, v.shape[4], dtype=v.dtype, device=v.device)
    row, token = ((which >= 0) & there.any(-1).gather(1, which.clamp_min(0))).nonzero(as_tuple=True)
    if len(row) == 0:
        return y.transpose(1, 2)
    # The chunks that are read, and of each the tokens that read it, side by side at their places.
    pair = row * U + which[row, token]
    read, number = pair.unique(return_inverse=True)
    at = place[row, token]
    queries = q.new_zeros(len(read), m, H, D).index_put((number, at), q.transpose(1, 2)[row, token])
    mask = there.flatten(0, 1)[read][:, None, None]
    keys, values = k.flatten(0, 1)[read], v.flatten(0, 1)[read]
    found = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
    return y.index_put((row, token), found.transpose(1, 2)[number, at]).transpose(1, 2)

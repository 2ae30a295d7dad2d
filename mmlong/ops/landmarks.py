"""Nystrom attention: softmax attention rebuilt from a few landmarks.

Definition (Xiong et al. 2021, arXiv 2102.03902), for every head, with ``Q_m`` and ``K_m`` the means of ``m`` segments of queries and of keys, and ``s`` the softmax over rows of scaled scores,

    Y = s(Q K_m^T) A^+ s(Q_m K^T) V,     A = s(Q_m K_m^T)

The pseudo-inverse is the paper's iteration of third order,

    Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z))),     Z_0 = A^T / (||A||_1 ||A||_inf)

with the norms of each matrix by itself. Segments are as even as the length allows: where ``m`` does not divide it, the first have one token more than the others. (The authors fill up with zeros, which are keys
like any other.) With as many landmarks as tokens, or more, it is attention itself, and is computed so, as the authors do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.ops.attention import attention
from mmlong.ops.cross_attention import cross_attention


def segment_means(x: Tensor, m: int) -> Tensor:
    """Means of ``m`` segments: ``(B, L, D)`` to ``(B, m, D)``, m <= L."""
    L = x.shape[1]
    size, longer = divmod(L, m)
    even = x[:, longer * (size + 1) :].unflatten(1, (m - longer, size)).mean(2)
    if not longer:
        return even
    return torch.cat([x[:, : longer * (size + 1)].unflatten(1, (longer, size + 1)).mean(2), even], 1)


def iterated_inverse(A: Tensor, steps: int) -> Tensor:
    """About the pseudo-inverse of ``A (..., m, m)``, rows of which are positive and sum to 1."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    columns, rows = A.sum(-2).amax(-1), A.sum(-1).amax(-1)
    Z = A.mT / (columns * rows)[..., None, None]
    for _ in range(steps):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, q_marks: Tensor, k_marks: Tensor, steps: int) -> Tensor:
    """Attention from landmarks; work and memory linear in the length.

    Args:
        q, k, v: ``(B, H, L, D)``.
        q_marks, k_marks: ``(B, H, m, D)``.
        steps: of the iteration.

    Returns:
        ``(B, H, L, D)``.
    """
    if q_marks.shape[2] >= q.shape[2]:
        return attention(q, k, v)
    gathered = cross_attention(q_marks, k, v)
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        scores = (q_marks.to(dtype) @ k_marks.to(dtype).mT) * q.shape[-1] ** -0.5
        values = iterated_inverse(scores.softmax(-1), steps) @ gathered.to(dtype)
    return cross_attention(q, k_marks, values.to(v.dtype))

"""Softmax attention over the best keys of every query, where a search by itself has found which those are.

The definition is that of :func:`mmlong.ops.best_keys.best_keys_attention` without a mask: with ``T_i`` the ``kept`` keys of the largest ``q_i . k_j``, as :func:`mmlong.ops.nearest.nearest` finds them,

    y_i = sum_{j in T_i} exp(scale q_i . k_j) v_j / sum of the same exp(scale q_i . k_j)

Here the keys found are gathered, ``kept`` rows for every query, and the others are in no product but the search's: for searches that are much faster than a product of our own. A gradient goes to the queries, and to the keys and values found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlong.ops.nearest import nearest


@torch.compiler.disable
def found_keys_attention(q: Tensor, k: Tensor, v: Tensor, kept: int, *, search: str, scale: float = 1.0) -> Tensor:
    """Attention over what a search finds.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, G, S, D)``, G dividing H, S >= 1.
        v: ``(B, G, S, E)``.
        kept: keys of a query, at least 1.
        search: as :func:`~mmlong.ops.nearest.nearest` takes it.
        scale: of the scores, positive.

    Returns:
        ``(B, H, L, E)`` like ``q``.

    Raises:
        ValueError: shapes that do not fit.
        ImportError: what the search needs is not installed.
    """
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape[:3] != k.shape[:3] or H % G or S < 1:
        raise ValueError(
            f"found_keys_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D), (B, G, S, D) and (B, G, S, E) with G dividing H"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    found = []
    with torch.autocast(q.device.type, enabled=False):
        for row in range(B):
            for group in range(G):
                asked = q[row].unflatten(0, (G, -1))[group].to(dtype).flatten(0, 1)
                keys, values = k[row, group].to(dtype), v[row, group].to(dtype)
                _, index = nearest(asked.detach(), keys.detach(), min(kept, S), "dot", search=search)
                scores = scale * (keys[index.clamp_min(0)] @ asked[..., None])[..., 0]
                weights = scores.masked_fill(index < 0, -math.inf).softmax(-1)
                found.append((weights[:, None] @ values[index.clamp_min(0)])[:, 0].unflatten(0, (-1, L)))
        return torch.stack(found).view(B, H, L, -1).to(q.dtype)

"""Softmax attention by its definition, with the full matrix of scores: for short sequences, for compilers, and for tests.

The formula, with every term that scores may have, is that of :mod:`mmlong.ops.score_terms`. Memory is quadratic in the length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.score_terms import Terms, dense_fade, dense_terms
from mmlong.ops.visible import Visible


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, terms: Terms | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention, all scores at once; arguments and result as :func:`mmlong.ops.attention.attention`. Scores are in at least float32."""
    L, S = q.shape[2], k.shape[2]
    terms = terms or Terms()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (t.to(dtype) for t in (q, k, v))
        if q.shape[1] != k.shape[1]:
            keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (keys, values))
        if terms.fade is not None:
            queries, keys = dense_fade(queries, keys, terms.fade)
        scores = scale * (queries @ keys.transpose(-1, -2))
        if terms.softcap is not None:
            scores = terms.softcap * torch.tanh(scores / terms.softcap)
        added = dense_terms(terms, L, S, scale, dtype)
        if added is not None:
            scores = scores + added
        scores = scores.masked_fill(~visible.mask(L, S, q.device), -math.inf)
        if terms.sink is not None:
            sink = terms.sink.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :S]
        else:
            weights = scores.softmax(-1)
        return (F.dropout(weights, dropout) @ values).to(q.dtype)

"""Softmax attention: the one door to every way of computing it.

Definition, for every head, with ``V_i`` the keys that query ``i`` sees (an interval, :mod:`mmlong.ops.visible`):

    y_i = sum_{j in V_i} exp(s_ij) v_j / sum_{j in V_i} exp(s_ij),      s_ij = q_i . k_j / sqrt(D)

(Vaswani et al. 2017, arXiv 1706.03762). Heads of queries may share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245). Scores may be bounded, have more added to them, and there may be a sink
(:class:`mmlong.ops.score_terms.Terms`). What computes it is a
backend (:mod:`mmlong.ops.attention_backends`): torch's own kernels, tiles that stay in a CPU's caches, or an optional package on a GPU.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from mmlong.ops.attention_backends import run_attention
from mmlong.ops.score_terms import Terms
from mmlong.ops.visible import Visible


def attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """The definition without terms, with the full matrix of scores; arguments and result as :func:`attention`. (With terms it is :func:`mmlong.ops.dense_attention.dense_attention`.)"""
    L, S = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible.mask(L, S, q.device), -math.inf).softmax(-1) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible | None = None,
    *,
    terms: Terms | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Exact softmax attention; memory is linear in the length.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, G, S, D)``, G dividing H and S >= L; the last key belongs to the last query.
        v: ``(B, G, S, E)``.
        visible: which keys each query sees; ``None`` for all.
        terms: what else there is in the scores. Tables over distances must have all that are seen.
        scale: of the scores; ``None`` for ``1 / sqrt(D)``.
        dropout: probability with which a weight is dropped; drawn from torch's generator.
        backend: a name that ``mmlong doctor`` lists, or ``auto`` for the best that can run here.

    Returns:
        ``(B, H, L, E)``.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: an unknown backend, or one that cannot do this, with the reason.
    """
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape[:3] != k.shape[:3] or H % G or S < L:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D), (B, G, S, D) and "
            "(B, G, S, E) with G dividing H and S >= L"
        )
    if terms is not None:
        terms.check(B, H, L, S, D)
        terms = terms if terms.kinds else None
    if scale is not None and (factor := scale * math.sqrt(D)) != 1:
        q = q * factor
        if terms is not None and terms.reads is not None:
            terms = dataclasses.replace(terms, reads=terms.reads * factor)
    return run_attention(q, k, v, visible or Visible(), dropout, backend, terms)

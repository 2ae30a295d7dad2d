"""Softmax attention to keys that expire: each key says how long it may be seen, and fades out at the end.

Definition, for every head, with ``e_j`` the span of key ``j`` in tokens, ``d = i - j`` the distance back from a query's own key, ``R`` the ramp, and ``p_d`` a vector for each of the ``N`` shortest distances (zero beyond):

    m_ij = min(1, max(0, 1 + (e_j - d) / R))
    s_ij = scale q_i . (k_j + p_d);      y_i = sum_j m_ij exp(s_ij) v_j / sum_j m_ij exp(s_ij)

(Sukhbaatar et al. 2021, arXiv 2105.06548). A mask that is not of distances alone is neither an interval nor a table, so this is no case of :mod:`mmlong.ops.attention`. Queries are taken in blocks; of a block's window of keys those that have expired, in all rows of the batch, for its first query and so for all, are left out
before anything is computed (where code may look at values). The backward computes a block's weights again, so that memory is linear in the length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.known import values_known
from mmlong.ops.tiled_attention import HIDDEN
from mmlong.ops.visible import Visible

SCORES = 1 << 20
"""Scores of a block, of all heads and rows."""

LEAST = 1e-6
"""A mask that is no larger is none. Beside a score that is large enough any would count, and whether there is one would be for rounding to say: of a span of e^-100 tokens, say, at the end of its ramp."""

QUERIES = 128
"""Queries of a block at most, so that keys that some of them no longer see are few."""


def expiring_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, near: Tensor, visible: Visible, ramp: int
) -> Tensor:
    """Causal attention; memory linear in the length.

    Args:
        q: ``(B, H, L, D)``.
        k, v: ``(B, G, S, D)``, G dividing H and S >= L; the last key belongs to the last query.
        spans: ``e (B, S)``, at least 0, in at least float32.
        near: ``p (N, D)``, of distances 0 and up; N may be 0.
        visible: which keys are seen at all; not to the right of a query's own.
        ramp: ``R``, in tokens.

    Returns:
        ``(B, H, L, D)`` like ``q``.
    """
    first, _ = visible.intervals(q.shape[2], k.shape[2], q.device)
    if torch.compiler.is_compiling():
        keys = torch.arange(k.shape[2], device=q.device)
        return _some(q, k, v, spans, near, keys, k.shape[2] - q.shape[2], first, ramp)
    return _Expiring.apply(q, k, v, spans, near, first, visible.left, ramp)


def _some(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, near: Tensor, keys: Tensor, own: int, first: Tensor, ramp: int
) -> Tensor:
    """Of some queries and keys.

    Args:
        q: ``(B, H, n, D)``.
        k, v: ``(B, G, w, D)``.
        spans: ``(B, w)``.
        keys: int64 ``(w,)``, which keys they are.
        own: the first query's own key.
        first: int64 ``(B or 1, n)``, the first key that each query may see.
    """
    (B, H, n, D), (G, w) = q.shape, k.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries = q.to(dtype) / math.sqrt(D)
        grouped = queries.reshape(B, G, H // G * n, D)
        scores = (grouped @ k.to(dtype).transpose(-1, -2)).view(B, H, n, w)
        distance = torch.arange(own, own + n, device=q.device)[:, None] - keys
        if N := near.shape[0]:
            products = queries @ near.to(dtype).T
            placed = products.gather(-1, distance.clamp(0, N - 1).expand(B, H, -1, -1))
            scores = scores + torch.where(distance < N, placed, 0)
        share = 1 + (spans[:, None] - distance) / ramp
        there = (share > LEAST) & (distance >= 0) & (keys >= first[..., None])
        # Of those that are seen at all; masks are multiplied in, since beside a score in the thousands a logarithm of theirs would be rounded away.
        weights = scores.masked_fill(~there[:, None], HIDDEN).softmax(-1)
        weights = weights * torch.where(there, share.clamp_max(1), 0)[:, None].to(dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        y = weights.view(B, G, H // G * n, w) @ v.to(dtype)
        return y.view(B, H, n, -1).to(q.dtype)


class _Expiring(torch.autograd.Function):
    """In blocks, each again in the backward, where the gradients of keys are added up in place: those of slices would each be as long as all of them."""

    @staticmethod
    def blocks(
        B: int, H: int, L: int, S: int, spans: Tensor, left: int | None, ramp: int
    ) -> list[tuple[int, int, int, int, Tensor | None]]:
        """``(i, j, a, b, kept)``: queries ``i:j``, keys ``a:b``, and which of those can be seen by some query; ``None`` for all."""
        left = S if left is None else min(left, S)
        step = max(1, min(QUERIES, L, SCORES // (B * H * min(left + QUERIES, S))))
        found: list[tuple[int, int, int, int, Tensor | None]] = []
        for i in range(0, L, step):
            j = min(i + step, L)
            own = S - L + i
            a, b = max(0, own - left), S - L + j
            kept = None
            if values_known():
                ends = torch.arange(a, b, device=spans.device) + spans[:, a:b] + ramp
                alive = (ends > own).any(0).nonzero()[:, 0]
                kept = alive if alive.shape[0] < b - a else None
            found.append((i, j, a, b, kept))
        return found

    @staticmethod
    def taken(
        k: Tensor, v: Tensor, spans: Tensor, a: int, b: int, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a block's keys: keys, values, spans, and which keys they are."""
        if kept is None:
            return k[:, :, a:b], v[:, :, a:b], spans[:, a:b], torch.arange(a, b, device=k.device)
        which = kept + a
        return k.index_select(2, which), v.index_select(2, which), spans.index_select(1, which), which

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Tensor,
        near: Tensor,
        first: Tensor,
        left: int | None,
        ramp: int,
    ) -> Tensor:
        (B, H, L, _), S = q.shape, k.shape[2]
        y = torch.empty(B, L, H, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        ctx.left, ctx.ramp = left, ramp
        ctx.save_for_backward(q, k, v, spans, near, first)
        for i, j, a, b, kept in _Expiring.blocks(B, H, L, S, spans, left, ramp):
            part_k, part_v, part_spans, keys = _Expiring.taken(k, v, spans, a, b, kept)
            y[:, :, i:j] = _some(q[:, :, i:j], part_k, part_v, part_spans, near, keys, S - L + i, first[:, i:j], ramp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, spans, near, first = ctx.saved_tensors
        (B, H, L, _), S = q.shape, k.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, wide)) for t in (k, v, spans, near)]
        for i, j, a, b, kept in _Expiring.blocks(B, H, L, S, spans, ctx.left, ctx.ramp):
            *parts, keys = _Expiring.taken(k, v, spans, a, b, kept)
            leaves = [t.detach().requires_grad_() for t in (q[:, :, i:j], *parts, near)]
            part_q, part_k, part_v, part_spans, part_near = leaves
            with torch.enable_grad():
                y = _some(part_q, part_k, part_v, part_spans, part_near, keys, S - L + i, first[:, i:j], ctx.ramp)
            found = torch.autograd.grad(y, leaves, dy[:, :, i:j], allow_unused=True)
            dq[:, :, i:j] = found[0]
            for total, part, axis in zip(sums[:3], found[1:4], (2, 2, 1), strict=True):
                where = total.narrow(axis, a, b - a)
                if kept is None:
                    where += part
                else:
                    where.index_add_(axis, kept, part.to(total.dtype))
            if found[4] is not None:
                sums[3] += found[4]
        return (dq, *(s.to(t.dtype) for s, t in zip(sums, (k, v, spans, near), strict=True)), None, None, None)

"""Attention by Laplace's function of each score, which sums to nothing in particular: Mega's alternative to the softmax (Ma et al. 2022, arXiv 2209.10655, section 3.4).

Definition, with ``V_i`` the keys that query ``i`` sees (an interval, :mod:`mmlong.ops.visible`):

    y_i = sum_{j in V_i} f(q_i . k_j) v_j,      f(s) = (1 + erf((s - mu) / (sigma sqrt 2))) / 2,      mu = sqrt(1/2), sigma = sqrt(1/(4 pi))

so that f meets the squared ReLU at 1/2 with its slope, and is bounded. Scores are not scaled here. Queries go in blocks over the keys that any of them sees; the backward recomputes a block's scores:

    dV_j = sum_i f_ij dY_i;   dS_ij = exp(-2 pi (s_ij - mu)^2) sqrt(2) (dY_i . V_j);   dQ_i = sum_j dS_ij K_j;   dK_j = sum_i dS_ij Q_i
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.visible import Visible

MU, SIGMA = math.sqrt(0.5), math.sqrt(0.25 / math.pi)

QUERIES = 64
"""Queries of a block on a CPU."""

GPU_QUERIES = 1024
"""The same on other devices."""


def laplace(s: Tensor) -> Tensor:
    """``f`` of scores."""
    return torch.erf((s - MU) / (SIGMA * math.sqrt(2))).add(1).mul(0.5)


def laplace_attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """The definition, one query at a time; arguments and result as :func:`laplace_attention`."""
    L, S = q.shape[1], k.shape[1]
    seen = visible.mask(L, S, q.device)[:, 0].expand(len(q), -1, -1)
    rows = []
    for q_row, k_row, v_row, mask in zip(q, k, v, seen, strict=True):
        rows.append(torch.stack([laplace(k_row[mask[i]] @ q_row[i]) @ v_row[mask[i]] for i in range(L)]))
    return torch.stack(rows)


def laplace_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Attention of one head.

    Args:
        q: ``(B, L, D)``.
        k: ``(B, S, D)``, S >= L; the last key belongs to the last query.
        v: ``(B, S, E)``.
        visible: which keys each query sees.

    Returns:
        ``(B, L, E)`` like ``q``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        given = tuple(t.to(dtype) for t in (q, k, v))
        L, S = q.shape[1], k.shape[1]
        if torch.compiler.is_compiling():
            y = _weights(given[0], given[1], visible.mask(L, S, q.device)[:, 0])[1] @ given[2]
        else:
            first, stop = visible.intervals(L, S, q.device)
            y = _Laplace.apply(*given, first, stop, tuple(_blocks(visible, first, stop, L, S)))
    return y.to(q.dtype)


def _blocks(visible: Visible, first: Tensor, stop: Tensor, L: int, S: int) -> Iterator[tuple[int, int, int, int]]:
    """Queries ``i:j`` and the keys ``a:b`` that they may see."""
    if first.device.type != "cpu":
        # By the window alone: to ask what rows see would wait for the device.
        left, right = (S if n is None else n for n in (visible.left, visible.right))
        for i in range(0, L, GPU_QUERIES):
            j = min(i + GPU_QUERIES, L)
            yield i, j, max(0, S - L + i - left), min(S, S - L + j + right)
        return
    least, most = first.amin(0), stop.amax(0)
    for i in range(0, L, QUERIES):
        j = min(i + QUERIES, L)
        yield i, j, int(least[i:j].min()), int(most[i:j].max())


def _weights(q: Tensor, k: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``s - mu`` and the weights ``(B, l, s)``, zero where a key is not ``seen (B or 1, l, s)``."""
    s = q @ k.transpose(1, 2) - MU
    return s, torch.where(seen, torch.erf(s / (SIGMA * math.sqrt(2))).add(1).mul(0.5), 0)


def _seen(first: Tensor, stop: Tensor, i: int, j: int, a: int, b: int) -> Tensor:
    key = torch.arange(a, b, device=first.device)
    return (key >= first[:, i:j, None]) & (key < stop[:, i:j, None])


class _Laplace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, blocks: tuple[tuple[int, ...], ...]
    ) -> Tensor:
        y = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for i, j, a, b in blocks:
            _, weights = _weights(q[:, i:j], k[:, a:b], _seen(first, stop, i, j, a, b))
            y[:, i:j] = weights @ v[:, a:b]
        ctx.save_for_backward(q, k, v, first, stop)
        ctx.blocks = blocks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, stop = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, j, a, b in ctx.blocks:
            seen = _seen(first, stop, i, j, a, b)
            s, weights = _weights(q[:, i:j], k[:, a:b], seen)
            dv[:, a:b] += weights.transpose(1, 2) @ dy[:, i:j]
            slope = s.square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2))
            ds = (dy[:, i:j] @ v[:, a:b].transpose(1, 2)).mul_(slope).masked_fill_(~seen, 0)
            dq[:, i:j] = ds @ k[:, a:b]
            dk[:, a:b] += ds.transpose(1, 2) @ q[:, i:j]
        return dq, dk, dv, None, None, None

"""Softmax attention over the ``kept`` best keys of every query: by its own scores, or by an indexer's.

Definition, with ``s_ij = scale q_i . k_j`` for the keys ``j`` that query ``i`` may see:

    T_i = the kept largest of  s_ij                                           of each head by itself (Gupta et al. 2021, arXiv 2106.06899)
                          or  I_ij = sum_h w_ih ReLU(u_ih . z_j)              one selection for all heads (the lightning indexer of DeepSeek-V3.2, arXiv 2512.02556)
    y_i = sum_{j in T_i} exp(s_ij) v_j / sum of the same exp(s_ij)

Equal scores are taken in the order of the keys (:mod:`mmlong.ops.top`). Every score is looked at, so the work is quadratic; queries are taken a few at a time, so memory is linear. Keys that are not selected are hidden and stay in the products:
to gather thousands of rows for every query would take many times as long. What is kept for the backward is the least score taken of each query, and the place of the last key that has it; scores are computed again, in the same
tiles. The selection passes a gradient of zero to what decided it.

:func:`indexer_loss` is what trains an indexer: the divergence of its softmax from the attention of all heads together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmlong.ops.top import again, select, top_mask

TILE_ELEMENTS = 1 << 21
"""Scores of a tile on a CPU, unless that were fewer than ``LEAST`` queries."""

GPU_TILE_ELEMENTS = 1 << 27
"""The same on other devices, where a call costs more than memory."""

LEAST = 16
"""Queries of a tile that pay for reading all keys."""


@dataclass(frozen=True)
class Index:
    """What an indexer looks at.

    Attributes:
        queries: ``u (B, L, J, D)``.
        keys: ``z (B, S, D)``, one for all its heads.
        weights: ``w (B, L, J)``.
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor

    def scores(self, i: int, j: int, n: int) -> Tensor:
        """``I (B, j - i, n)`` of the queries ``i:j`` and the first ``n`` keys, in at least float32."""
        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        u, z = self.queries[:, i:j].to(dtype), self.keys[:, :n].to(dtype)
        met = torch.bmm(u.flatten(1, 2), z.transpose(1, 2)).relu().view(*u.shape[:3], n)
        return (self.weights[:, i:j, None].to(dtype) @ met)[:, :, 0]


def best_keys_reference(
    q: Tensor, k: Tensor, v: Tensor, kept: int, *, causal: bool, index: Index | None = None, scale: float | None = None
) -> Tensor:
    """The definition, with the full matrix of scores; arguments and result as :func:`best_keys_attention`."""
    (L, D), S = q.shape[2:], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(dtype) for t in (k, v))
        scores = (1 / math.sqrt(D) if scale is None else scale) * (q.to(dtype) @ k.transpose(-1, -2))
        by = scores if index is None else index.scores(0, L, S)[:, None]
        if causal:
            later = torch.ones(L, S, dtype=torch.bool, device=q.device).triu(S - L + 1)
            by = by.masked_fill(later, -math.inf)
        return (scores.masked_fill(~top_mask(by.detach(), kept), -math.inf).softmax(-1) @ v).to(q.dtype)


@torch.compiler.disable
def best_keys_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: int, *, causal: bool, index: Index | None = None, scale: float | None = None
) -> Tensor:
    """Attention over the best keys; work quadratic, memory linear in the length.

    Args:
        q: ``(B, H, L, D)``; the last query belongs to the last key.
        k: ``(B, G, S, D)``, G dividing H and, causal, S >= L.
        v: ``(B, G, S, E)``.
        kept: keys of a query, at least 1.
        causal: see no later key.
        index: by what to select; ``None`` for the scores of each head.
        scale: of the scores; ``None`` for ``1 / sqrt(D)``.

    Returns:
        ``(B, H, L, E)`` like ``q``.

    Raises:
        ValueError: shapes that do not fit, or no key to keep.
    """
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape[:3] != k.shape[:3] or H % G or (causal and S < L):
        raise ValueError(
            f"best_keys_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D), (B, G, S, D) and (B, G, S, E) with G dividing H and, causal, S >= L"
        )
    if kept < 1:
        raise ValueError(f"best_keys_attention: kept must be at least 1, got {kept}")
    scale = 1 / math.sqrt(D) if scale is None else scale
    parts = [None] * 3 if index is None else [index.queries, index.keys, index.weights]
    return _BestKeys.apply(q, k, v, *parts, _Plan(kept, causal, scale, L, S, H, B))


@dataclass(frozen=True)
class _Plan:
    kept: int
    causal: bool
    scale: float
    L: int
    S: int
    H: int
    B: int

    def tiles(self, device: torch.device, wide: int = 0) -> Iterator[tuple[slice, int, int, int]]:
        """Rows of the batch, queries ``i:j`` of them, and how many keys the last of those sees. ``wide``: heads of scores, if more than those of the queries."""
        elements = TILE_ELEMENTS if device.type == "cpu" and not torch.compiler.is_exporting() else GPU_TILE_ELEMENTS
        heads = max(self.H, wide)
        i = 0
        while i < self.L:
            # In a causal tile the last query sees all that came before, its own tile among it.
            most, past = elements / heads, self.S - self.L + i
            step = (math.sqrt(past**2 + 4 * most) - past) / 2 if self.causal else most / self.S
            j = min(self.L, i + max(LEAST, int(step)))
            n = self.S - self.L + j if self.causal else self.S
            together = max(1, elements // (heads * (j - i) * n))
            for r in range(0, self.B, together):
                yield slice(r, min(r + together, self.B)), i, j, n
            i = j

    def hide(self, scores: Tensor, i: int, j: int, value: float) -> None:
        """Scores ``(.., j - i, n)`` of later keys."""
        if self.causal and j - i > 1:
            later = torch.ones(j - i, j - i, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., -(j - i) :].masked_fill_(later, value)


class _Tile:
    """What both directions compute of a tile: masked scores as weights."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, index: Index | None, plan: _Plan) -> None:
        self.q, self.k, self.v, self.index, self.plan = q, k, v, index, plan
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.G = k.shape[1]

    def rows(self, t: Tensor, rows: slice, i: int, j: int) -> Tensor:
        part = t[rows, :, i:j].to(self.dtype)
        return part.reshape(part.shape[0] * self.G, -1, part.shape[3])

    def keys(self, t: Tensor, rows: slice, n: int) -> Tensor:
        return t[rows, :, :n].to(self.dtype).flatten(0, 1)

    def scores(self, rows: slice, i: int, j: int, n: int) -> tuple[Tensor, Tensor]:
        """Scores ``(rows, H, j - i, n)``, and those that decide ``(rows, H or 1, j - i, n)``; later keys hidden in both."""
        queries = self.rows(self.q, rows, i, j) * self.plan.scale
        scores = torch.bmm(queries, self.keys(self.k, rows, n).transpose(1, 2))
        scores = scores.view(-1, self.plan.H, j - i, n)
        self.plan.hide(scores, i, j, -math.inf)
        if self.index is None:
            return scores, scores
        part = Index(self.index.queries[rows], self.index.keys[rows], self.index.weights[rows])
        by = part.scores(i, j, n)[:, None]
        self.plan.hide(by, i, j, -math.inf)
        return scores, by


class _BestKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_queries: Tensor | None,
        index_keys: Tensor | None,
        index_weights: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        index = None
        if index_queries is not None and index_keys is not None and index_weights is not None:
            index = Index(index_queries, index_keys, index_weights)
        tile = _Tile(q, k, v, index, plan)
        B, H, L, _ = q.shape
        y = torch.empty(B, L, H, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        shape = (B, H if index is None else 1, L, 1)
        least = torch.full(shape, -math.inf, dtype=tile.dtype, device=q.device)
        last = torch.full(shape, plan.S, device=q.device)
        tied: list[bool] = []
        with torch.autocast(q.device.type, enabled=False):
            for rows, i, j, n in plan.tiles(q.device, 0 if index is None else index.queries.shape[2]):
                scores, by = tile.scores(rows, i, j, n)
                mask, low, end = select(by, plan.kept)
                least[rows, :, i:j] = low
                if end is not None:
                    last[rows, :, i:j] = end
                tied.append(end is not None)
                scores.masked_fill_(mask.logical_not_(), -math.inf)
                weights = scores.softmax(-1).view(-1, H // tile.G * (j - i), n)
                y[rows, :, i:j] = torch.bmm(weights, tile.keys(v, rows, n)).view(-1, H, j - i, v.shape[3])
        ctx.save_for_backward(q, k, v, index_queries, index_keys, index_weights, y, least, last)
        ctx.plan, ctx.tied = plan, tied
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index_queries, index_keys, index_weights, y, least, last = ctx.saved_tensors
        plan: _Plan = ctx.plan
        index = None if index_queries is None else Index(index_queries, index_keys, index_weights)
        tile = _Tile(q, k, v, index, plan)
        H, tied = q.shape[1], iter(ctx.tied)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=tile.dtype, device=q.device) for t in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            for rows, i, j, n in plan.tiles(q.device, 0 if index is None else index.queries.shape[2]):
                scores, by = tile.scores(rows, i, j, n)
                end = last[rows, :, i:j] if next(tied) else None
                scores.masked_fill_(again(by, least[rows, :, i:j], end).logical_not_(), -math.inf)
                weights = scores.softmax(-1).view(-1, H // tile.G * (j - i), n)
                dout, out = tile.rows(dy, rows, i, j), tile.rows(y, rows, i, j)
                keys, values = tile.keys(k, rows, n), tile.keys(v, rows, n)
                slopes = torch.bmm(dout, values.transpose(1, 2))
                slopes.sub_((dout * out).sum(-1, keepdim=True)).mul_(weights)
                dv[rows, :, :n] += torch.bmm(weights.transpose(1, 2), dout).view(-1, tile.G, n, v.shape[3])
                dq[rows, :, i:j] = torch.bmm(slopes, keys).mul_(plan.scale).view(-1, H, j - i, q.shape[3]).to(q.dtype)
                queries = tile.rows(q, rows, i, j) * plan.scale
                dk[rows, :, :n] += torch.bmm(slopes.transpose(1, 2), queries).view(-1, tile.G, n, q.shape[3])
        # Zeros, and not nothing: whole, in segments and on several ranks the same parameters have a gradient.
        taught = [
            torch.zeros_like(t) if needed else None
            for t, needed in zip((index_queries, index_keys, index_weights), ctx.needs_input_grad[3:6], strict=True)
        ]
        return dq, dk.to(k.dtype), dv.to(v.dtype), *taught, None


def indexer_loss(
    q: Tensor, k: Tensor, index: Index, kept: int | None, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """What trains an indexer: ``mean over queries of KL(p_i || softmax(I_i))``, with ``p`` the weights of all heads summed and made to sum to 1; no gradient goes to ``q`` and ``k``.

    Args:
        q, k, causal, scale: as :func:`best_keys_attention` takes them.
        index: the indexer's, with gradients.
        kept: both sides over the keys selected (the sparse stage), or over all keys seen (``None``, the dense warm-up).

    Returns:
        a scalar in at least float32.
    """
    (B, H, L, D), S = q.shape, k.shape[2]
    plan = _Plan(S if kept is None else kept, causal, 1 / math.sqrt(D) if scale is None else scale, L, S, H, B)
    q, k = q.detach(), k.detach()
    total = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)

    def part(u: Tensor, z: Tensor, w: Tensor, rows: slice, i: int, j: int, n: int) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            by = Index(u, z, w).scores(0, j - i, n)
            with torch.no_grad():
                hidden = by.detach().clone()
                plan.hide(hidden, i, j, -math.inf)
                taken = top_mask(hidden, plan.kept)
                scores, _ = _Tile(q, k, k, None, plan).scores(rows, i, j, n)
                share = scores.masked_fill_(~taken[:, None], -math.inf).softmax(-1).mean(1)
            logs = by.masked_fill(~taken, -math.inf).log_softmax(-1).masked_fill(~taken, 0)
            return (torch.special.xlogy(share, share) - share * logs).sum()

    for rows, i, j, n in plan.tiles(q.device, index.queries.shape[2]):
        args = (index.queries[rows, i:j], index.keys[rows, :n], index.weights[rows, i:j], rows, i, j, n)
        total = total + (checkpoint(part, *args, use_reentrant=False) if torch.is_grad_enabled() else part(*args))
    return total / (B * L)

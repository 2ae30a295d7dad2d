"""Exact softmax attention in tiles that stay in the cache, each query over an interval of keys; memory linear in the length.

Definition, for every head, with ``first_i <= j < stop_i`` the keys that query ``i`` sees:

    s_ij = scale q_i . k_j;     y_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)

Queries are taken in blocks; the keys of a block run from the least ``first`` to the greatest ``stop`` in it, so keys that nobody sees cost nothing, whether it is a
window, causality or a document that hides them. Where those keys are many they are taken in tiles and merged (Rabe & Staats 2021, arXiv 2112.05682; Dao et al. 2022,
arXiv 2205.14135): with ``l`` the logarithm of a tile's sum and ``y`` its normalised result,

    l = log(exp(l_1) + exp(l_2));     y = exp(l_1 - l) y_1 + exp(l_2 - l) y_2

Only columns that some query of the block does not see are masked. The backward is written out and recomputes a tile's weights ``P``; with ``d_i = dY_i . Y_i``:

    dV_j = sum_i P_ij dY_i;   dS_ij = P_ij (dY_i . V_j - d_i);   dQ_i = scale sum_j dS_ij K_j;   dK_j = scale sum_i dS_ij Q_i

A library's softmax is several times as fast as its exponential, so weights come from it, and a tile's ``l`` from its largest score ``m`` and largest weight ``p``: ``l = m -
log p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 19
"""Scores of a tile: with a copy of them for the backward they stay in the second and third-level caches of common processors."""

MAX_KEYS = 2048
"""Keys of a tile."""

HIDDEN = -1e30
"""A score that weighs nothing beside any other, but is finite: a tile in which a query sees no key has no NaN in it."""


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention over an interval of keys for every query.

    Args:
        q: ``(B, H, L, D)``; any strides.
        k: ``(B, G, S, D)``, G dividing H: head ``h`` reads ``h // (H // G)``.
        v: ``(B, G, S, E)``.
        first, stop: int64 ``(B or 1, L)``, the keys that a query sees.
        scale: of the scores.
        dropout: probability with which a weight is dropped; which ones is drawn again, not kept, for the backward.

    Returns:
        ``(B, H, L, E)`` like ``q``, its tokens before its heads in memory.

    Raises:
        ValueError: a query that sees no key.
    """
    if int((stop - first).amin()) < 1:
        raise ValueError("tiled_attention: a query sees no key: an interval needs first < stop")
    drop = _Dropout(q.device, dropout) if dropout else None
    return _Tiled.apply(q, k, v, Pairs(first, stop, scale, drop))


@dataclass(frozen=True)
class _Block:
    """Queries ``i:j`` of some rows, keys ``a:b``; all of them see ``full_a:full_b``."""

    rows: slice
    i: int
    j: int
    a: int
    b: int
    full_a: int
    full_b: int

    def tiles(self) -> Iterator[tuple[int, int]]:
        for x in range(self.a, self.b, MAX_KEYS):
            yield x, min(x + MAX_KEYS, self.b)


def _blocks(first: Tensor, stop: Tensor, B: int, H: int, repeat: int) -> Iterator[_Block]:
    """Blocks of queries, sized so that a tile has about ``TILE_ELEMENTS`` scores."""
    R, L = first.shape
    width = max(int((stop - first).amax()), 1)
    # At least as many rows in a product as pay for its start, and no more than make most of the keys of a block common.
    step = max(32 // repeat, 1, min(128, TILE_ELEMENTS // (H * min(width + 64, MAX_KEYS))))
    step = min(step, L)
    short = -L % step
    edge = [torch.cat([t, t[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, step)) for t in (first, stop)]
    bounds = torch.stack([edge[0].amin(-1), edge[0].amax(-1), edge[1].amin(-1), edge[1].amax(-1)]).tolist()
    together = max(1, TILE_ELEMENTS // (H * step * min(width + step, MAX_KEYS)))
    for r in range(0, B, together):
        rows = slice(r, min(r + together, B))
        for n, i in enumerate(range(0, L, step)):
            of = [[row[n] for row in (kind if R == 1 else kind[rows])] for kind in bounds]
            yield _Block(rows, i, min(i + step, L), min(of[0]), max(of[3]), max(of[1]), min(of[2]))


class _Scores:
    """The scores of a tile, in memory that all tiles use in turn."""

    def __init__(self, like: Tensor, dtype: torch.dtype, first: Tensor, stop: Tensor, repeat: int) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=like.device)
        self._weights = torch.empty(0, dtype=dtype, device=like.device)
        self._first, self._stop, self._repeat = first, stop, repeat

    def __call__(self, q: Tensor, k: Tensor, block: _Block, x: int, y: int) -> tuple[Tensor, Tensor]:
        """``(scores, weights)`` of a tile, both ``(N, rows of q, y - x)``; the weights sum to 1 over the tile."""
        shape = (q.shape[0], q.shape[1], y - x)
        n = shape[0] * shape[1] * shape[2]
        if self._memory.numel() < n:
            self._memory, self._weights = self._memory.new_empty(n), self._weights.new_empty(n)
        scores, weights = self._memory[:n].view(shape), self._weights[:n].view(shape)
        torch.bmm(q, k.transpose(1, 2), out=scores)
        self._hide(scores, block, x, y)
        torch.softmax(scores, -1, out=weights)
        return scores, weights

    def _hide(self, scores: Tensor, block: _Block, x: int, y: int) -> None:
        first, stop = (t if t.shape[0] == 1 else t[block.rows] for t in (self._first, self._stop))
        left, right = (min(max(edge, x), y) for edge in (block.full_a, block.full_b))
        if left > right:
            left = right = y  # no key is seen by all: every column needs both tests
        grouped = scores.unflatten(0, (block.rows.stop - block.rows.start, -1)).unflatten(2, (self._repeat, -1))
        for p, r in ((x, left), (right, y)):
            if p < r:
                key = torch.arange(p, r, device=scores.device)
                i, j = block.i, block.j
                hidden = (key < first[:, i:j, None]) | (key >= stop[:, i:j, None])
                grouped[..., p - x : r - x].masked_fill_(hidden[:, None, None], HIDDEN)


class _Dropout:
    """Which weights are dropped, the same each time a tile is asked about. One number is drawn from torch's own generator."""

    def __init__(self, device: torch.device, rate: float) -> None:
        self._seed = int(torch.randint(1 << 40, (1,)))
        self._generator = torch.Generator(device)
        self._kept = 1 - rate

    def __call__(self, like: Tensor, block: _Block, x: int) -> Tensor:
        """A factor for every weight of a tile: 0, or what makes up for those that are 0."""
        place = ((block.rows.start * 0x9E3779B1 + block.i) * 0x85EBCA6B + x) & ((1 << 62) - 1)
        self._generator.manual_seed(self._seed ^ place)
        kept = torch.empty_like(like).bernoulli_(self._kept, generator=self._generator)
        return kept.div_(self._kept)


def _log_sum(scores: Tensor, weights: Tensor) -> Tensor:
    return scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def _queries(t: Tensor, block: _Block, G: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``(B, H, L, D)`` as ``(rows * G, heads of a group * queries, D)``."""
    part = t[block.rows, :, block.i : block.j].to(dtype)
    r, H, n, D = part.shape
    return part.reshape(r * G, H // G * n, D)


def _keys(t: Tensor, rows: slice, x: int, y: int, dtype: torch.dtype) -> Tensor:
    return t[rows, :, x:y].to(dtype).flatten(0, 1)


@dataclass(frozen=True)
class Pairs:
    """Which queries meet which keys, and how: what both directions of a call need beside its tensors.

    Attributes:
        first, stop: int64 ``(B or 1, L)``, the keys that a query sees.
        scale: of the scores.
        drop: which weights are dropped.
    """

    first: Tensor
    stop: Tensor
    scale: float
    drop: _Dropout | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, partial: bool) -> tuple[Tensor, Tensor | None]:
    """Attention without a gradient; arguments as :func:`tiled_attention`.

    Args:
        partial: these are not all the keys. What is returned is to be merged with what others give (:func:`merge`), and a query may see none of them.

    Returns:
        ``(y, log_sums)``: ``log_sums (B, H, L)``, logarithms of the sums of ``exp(s_ij)``; without ``partial`` only where the backward needs them. Where a query sees no key ``y`` is any
        finite number, and ``log_sums`` weighs it with nothing. ``y`` is like ``q``, of a partial result in at least float32.
    """
    (B, H, L, _), (_, G, _, E) = q.shape, v.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    y = torch.empty(B, L, H, E, dtype=dtype if partial else q.dtype, device=q.device).transpose(1, 2)
    log_sums: Tensor | None = q.new_full((B, H, L), HIDDEN, dtype=dtype) if partial else None
    score = _Scores(q, dtype, pairs.first, pairs.stop, H // G)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(pairs.first, pairs.stop, B, H, H // G):
            if block.b <= block.a:
                y[block.rows, :, block.i : block.j] = 0
                continue
            queries = _queries(q, block, G, dtype) * pairs.scale
            out = total = None
            for a, b in block.tiles():
                scores, weights = score(queries, _keys(k, block.rows, a, b, dtype), block, a, b)
                merged = partial or block.b - block.a > MAX_KEYS
                log = _log_sum(scores, weights) if merged else None
                if pairs.drop is not None:
                    weights.mul_(pairs.drop(weights, block, a))
                part = torch.bmm(weights, _keys(v, block.rows, a, b, dtype))
                if log is None:
                    out = part
                elif out is None or total is None:
                    out, total = part, log
                else:
                    out, total = merge(out, total, part, log)
            assert out is not None
            y[block.rows, :, block.i : block.j] = out.view(-1, H, block.j - block.i, E)
            if total is not None:
                if log_sums is None:
                    log_sums = torch.empty(B, H, L, dtype=dtype, device=q.device)
                log_sums[block.rows, :, block.i : block.j] = total.view(-1, H, block.j - block.i)
    return y, log_sums


def merge(y: Tensor, log: Tensor, more: Tensor, more_log: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over different keys as one, in the memory of both: ``(y, log sum)``, the logs of the results' shape or with a last axis of 1."""
    both = torch.logaddexp(log, more_log)
    return y.mul_((log - both).exp()).add_(more.mul_((more_log - both).exp())), both


def attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor | None, pairs: Pairs, partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v`` of :func:`attend`, the latter two in at least float32.

    Args:
        dy, y: gradient and result, of partial ones those of the merged result.
        log_sums: over all keys that a query sees, of partial results the merged ones.
    """
    (B, H, L, D), (_, G, S, E) = q.shape, v.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(B, L, H, D, dtype=dtype if partial else q.dtype, device=q.device).transpose(1, 2)
    dk = torch.zeros(B, G, S, D, dtype=dtype, device=q.device)
    dv = torch.zeros(B, G, S, E, dtype=dtype, device=q.device)
    score = _Scores(q, dtype, pairs.first, pairs.stop, H // G)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(pairs.first, pairs.stop, B, H, H // G):
            rows = block.rows
            if block.b <= block.a:
                dq[rows, :, block.i : block.j] = 0
                continue
            queries = _queries(q, block, G, dtype) * pairs.scale
            gradient = _queries(dy, block, G, dtype)
            shared = (gradient * _queries(y, block, G, dtype)).sum(-1, keepdim=True)
            total = None
            if partial or block.b - block.a > MAX_KEYS:
                assert log_sums is not None
                total = log_sums[rows, :, block.i : block.j].reshape(*queries.shape[:2], 1)
            dqueries: Tensor | None = None
            for a, b in block.tiles():
                keys = _keys(k, rows, a, b, dtype)
                scores, weights = score(queries, keys, block, a, b)
                dout, d = gradient, shared
                if total is not None:
                    # The weights sum to 1 over the tile, not over all keys; what they meet is scaled instead of them.
                    part = (_log_sum(scores, weights) - total).exp()
                    dout, d = gradient * part, shared * part
                factor = None if pairs.drop is None else pairs.drop(weights, block, a)
                met = weights if factor is None else weights * factor
                _add_product(dv[rows, :, a:b], met.transpose(1, 2), dout)
                torch.bmm(dout, _keys(v, rows, a, b, dtype).transpose(1, 2), out=scores)
                if factor is not None:
                    scores.mul_(factor)
                dscores = scores.sub_(d).mul_(weights)
                found = torch.bmm(dscores, keys)
                dqueries = found if dqueries is None else dqueries.add_(found)
                _add_product(dk[rows, :, a:b], dscores.transpose(1, 2), queries)
            assert dqueries is not None
            dq[rows, :, block.i : block.j] = dqueries.mul_(pairs.scale).view(-1, H, block.j - block.i, D)
    return dq, dk, dv


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        y, log_sums = attend(q, k, v, pairs, partial=False)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.pairs = pairs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums = ctx.saved_tensors
        dq, dk, dv = attend_backward(dy, q, k, v, y, log_sums, ctx.pairs, partial=False)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total (rows, G, n, D) += a @ b``; a product that adds would be run head by head, since ``total`` is a part of something."""
    total.add_(torch.bmm(a, b).view(total.shape))

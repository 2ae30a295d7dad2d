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

Scores may have more in them than the product (:mod:`mmlong.ops.score_terms`): a tile is filled with that before the product is added, and what it is made of takes ``dS_ij``. A sink is one more part, of
no value, and so a factor of the result: ``y exp(l) / (exp(l) + exp(z))``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.score_terms import Faded, Terms, TermTiles

TILE_ELEMENTS = 1 << 19
"""Scores of a tile: with a copy of them for the backward they stay in the second and third-level caches of common processors."""

MAX_KEYS = 2048
"""Keys of a tile."""

MOST_QUERIES = 128
"""Queries of a block."""

HIDDEN = -1e30
"""A score that weighs nothing beside any other, but is finite: a tile in which a query sees no key has no NaN in it."""


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    scale: float,
    dropout: float = 0.0,
    terms: Terms | None = None,
) -> Tensor:
    """Attention over an interval of keys for every query.

    Args:
        q: ``(B, H, L, D)``; any strides.
        k: ``(B, G, S, D)``, G dividing H: head ``h`` reads ``h // (H // G)``.
        v: ``(B, G, S, E)``.
        first, stop: int64 ``(B or 1, L)``, the keys that a query sees.
        scale: of the scores.
        dropout: probability with which a weight is dropped; which ones is drawn again, not kept, for the backward.
        terms: what else there is in the scores.

    Returns:
        ``(B, H, L, E)`` like ``q``, its tokens before its heads in memory.

    Raises:
        ValueError: a query that sees no key.
    """
    if int((stop - first).amin()) < 1:
        raise ValueError("tiled_attention: a query sees no key: an interval needs first < stop")
    if terms is not None and terms.sink is not None:
        y, log_sums = tiled_attention_part(q, k, v, first, stop, scale, dropout, terms)
        return (y * with_sink(log_sums, terms.sink)).to(q.dtype)
    drop = _Dropout(q.device, dropout) if dropout else None
    pairs, tensors = _apart(Pairs(first, stop, scale, drop, terms))
    return _Tiled.apply(q, k, v, pairs, *tensors)


def with_sink(log_sums: Tensor, sink: Tensor) -> Tensor:
    """What a sink leaves of a result, ``(B, H, L, 1)``, from the log sums of its scores ``(B, H, L)`` and the sink's own scores ``(H,)``."""
    return torch.sigmoid(log_sums - sink.to(log_sums.dtype)[:, None])[..., None]


def tiled_attention_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    stop: Tensor,
    scale: float,
    dropout: float = 0.0,
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor]:
    """The same over some of the keys, to be merged with others (:func:`mmlong.ops.block_attention.merge_parts`); arguments as :func:`tiled_attention`, intervals may be empty. A sink of the terms is left
    to the merge (:func:`with_sink`).

    Returns:
        ``y (B, H, L, E)`` in at least float32 and ``log_sums (B, H, L)``, the logarithms of the sums of ``exp(s_ij)``; both have gradients. Where a query sees no key ``y`` is any finite number, and its log
        sum is so low that a merge weighs it with nothing.
    """
    drop = _Dropout(q.device, dropout) if dropout else None
    pairs, tensors = _apart(Pairs(first, stop, scale, drop, terms))
    return _TiledPart.apply(q, k, v, pairs, *tensors)


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
    step = max(32 // repeat, 1, min(MOST_QUERIES, TILE_ELEMENTS // (H * min(width + 64, MAX_KEYS))))
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
    """The scores of a tile, in memory that all tiles use in turn.

    Args:
        q, k: ``(B, H, L, D)`` and ``(B, G, S, D)``, of the call.
        dtype: of the tiles.
        pairs: of the call.
        gradient: whether :meth:`through` will be called.
    """

    def __init__(self, q: Tensor, k: Tensor, dtype: torch.dtype, pairs: Pairs, gradient: bool = False) -> None:
        self._memory, self._weights, self._slopes = (torch.empty(0, dtype=dtype, device=q.device) for _ in range(3))
        self._first, self._stop, self._scale = pairs.first, pairs.stop, pairs.scale
        self._dtype, self._heads, self._groups = dtype, q.shape[1], k.shape[1]
        terms = pairs.terms or Terms()
        own = k.shape[2] - q.shape[2] if pairs.own is None else pairs.own
        self._own, self._cap = own, terms.softcap
        self._faded = None if terms.fade is None else Faded(terms.fade, dtype)
        self.added: TermTiles | None = None
        if any(t is not None for t in terms.tensors()):
            margin = min(MOST_QUERIES, q.shape[2]) + min(MAX_KEYS, k.shape[2])
            self.added = TermTiles(terms, own, pairs.scale, dtype, margin, gradient)
        self._gradient = gradient
        self._least = torch.finfo(dtype).tiny * 1e8

    @property
    def reverse(self) -> bool:
        """Whether the queries of a block come last first."""
        return self.added is not None and self.added.reverse

    def rows(self, t: Tensor, block: _Block) -> Tensor:
        """The queries of a block of ``(B, H, L, D)`` as ``(rows * G, heads of a group * queries, D)``."""
        part = t[block.rows, :, block.i : block.j].to(self._dtype)
        r, H, n, D = part.shape
        return (part.flip(2) if self.reverse else part).reshape(r * self._groups, H // self._groups * n, D)

    def put(self, total: Tensor, block: _Block, found: Tensor) -> None:
        """The inverse of :meth:`rows`: write a block's results to their place in ``(B, H, L, D)`` or ``(B, H, L)``."""
        place = total[block.rows, :, block.i : block.j]
        found = found.view(place.shape)
        place.copy_(found.flip(2) if self.reverse else found)

    def fades(self, block: _Block) -> Tensor | None:
        """What the queries of a block are multiplied by, one block's queries to a row of heads ``(1, heads of a group, queries, D)``, flat."""
        if self._faded is None:
            return None
        factor = self._faded.queries(block.j - block.i, self.reverse)
        return factor.repeat(self._heads // self._groups, 1)

    def queries(self, q: Tensor, block: _Block) -> Tensor:
        """The queries of a block, scaled and faded."""
        scaled = self.rows(q, block) * self._scale
        factor = self.fades(block)
        return scaled if factor is None else scaled.mul_(factor)

    def key_fades(self, block: _Block, x: int, y: int) -> Tensor | None:
        """What the keys of a tile are multiplied by, ``(y - x, D)``."""
        return None if self._faded is None else self._faded.keys(self._own + block.i, x, y)

    def keys(self, t: Tensor, block: _Block, x: int, y: int) -> Tensor:
        """Keys or values of a tile, ``(rows * G, y - x, D)``."""
        return t[block.rows, :, x:y].to(self._dtype).flatten(0, 1)

    def __call__(self, q: Tensor, k: Tensor, block: _Block, x: int, y: int) -> tuple[Tensor, Tensor]:
        """``(scores, weights)`` of a tile, both ``(N, rows of q, y - x)``; the weights sum to 1 over the tile."""
        shape = (q.shape[0], q.shape[1], y - x)
        n = shape[0] * shape[1] * shape[2]
        if self._memory.numel() < n:
            self._memory, self._weights = self._memory.new_empty(n), self._weights.new_empty(n)
        scores, weights = self._memory[:n].view(shape), self._weights[:n].view(shape)
        keys = k.transpose(1, 2)
        if self._cap is not None:
            torch.bmm(q, keys, out=scores)
            self._bound(scores, self._cap)
            if self.added is not None:
                self.added.fill(self._heads_apart(weights, block), block.rows, block.i, block.j, x, y)
                scores.add_(weights)
        elif self.added is not None:
            self.added.fill(self._heads_apart(scores, block), block.rows, block.i, block.j, x, y)
            scores.baddbmm_(q, keys)
        else:
            torch.bmm(q, keys, out=scores)
        self._hide(scores, block, x, y)
        torch.softmax(scores, -1, out=weights)
        if self.added is not None:
            # Decays and slopes leave stretches of weights near the smallest numbers there are, with which a CPU multiplies very slowly.
            torch.threshold_(weights, self._least, 0.0)
        return scores, weights

    def through(self, d: Tensor, block: _Block, x: int, y: int) -> Tensor:
        """From the gradient of a tile's scores, in place, that of the products; the terms take theirs."""
        if self.added is not None:
            self.added.take(self._heads_apart(d, block), block.rows, block.i, block.j, x, y)
        if self._cap is not None:
            d.mul_(self._slopes[: d.numel()].view(d.shape))
        return d

    def _heads_apart(self, t: Tensor, block: _Block) -> Tensor:
        return t.view(-1, self._heads, block.j - block.i, t.shape[-1])

    def _bound(self, scores: Tensor, cap: float) -> None:
        scores.div_(cap).tanh_()
        if self._gradient:
            if self._slopes.numel() < scores.numel():
                self._slopes = self._slopes.new_empty(scores.numel())
            slopes = self._slopes[: scores.numel()].view(scores.shape)
            torch.mul(scores, scores, out=slopes)
            slopes.neg_().add_(1)
        scores.mul_(cap)

    def _hide(self, scores: Tensor, block: _Block, x: int, y: int) -> None:
        first, stop = (t if t.shape[0] == 1 else t[block.rows] for t in (self._first, self._stop))
        left, right = (min(max(edge, x), y) for edge in (block.full_a, block.full_b))
        if left > right:
            left = right = y  # no key is seen by all: every column needs both tests
        i, j = block.i, block.j
        first, stop = ((t.flip(1) if self.reverse else t)[..., None] for t in (first[:, i:j], stop[:, i:j]))
        grouped = scores.unflatten(0, (block.rows.stop - block.rows.start, -1)).unflatten(2, (-1, j - i))
        for p, r in ((x, left), (right, y)):
            if p < r:
                key = torch.arange(p, r, device=scores.device)
                hidden = (key < first) | (key >= stop)
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


@dataclass(frozen=True)
class Pairs:
    """Which queries meet which keys, and how: what both directions of a call need beside its tensors.

    Attributes:
        first, stop: int64 ``(B or 1, L)``, the keys that a query sees.
        scale: of the scores.
        drop: which weights are dropped.
        terms: what else there is in the scores; a sink is not looked at.
        own: the key, of those of the call, that the first query owns, from which distances are counted; it may lie outside. ``None``: the last query owns the last key.
    """

    first: Tensor
    stop: Tensor
    scale: float
    drop: _Dropout | None = None
    terms: Terms | None = None
    own: int | None = None


def _apart(pairs: Pairs) -> tuple[Pairs, tuple[Tensor | None, ...]]:
    """For autograd: pairs without the tensors of their terms, and those."""
    if pairs.terms is None:
        return pairs, (None,) * 4
    tensors = pairs.terms.tensors()
    return replace(pairs, terms=pairs.terms.holding((None,) * 4)), tensors


def _joined(pairs: Pairs, tensors: tuple[Tensor | None, ...]) -> Pairs:
    return pairs if pairs.terms is None else replace(pairs, terms=pairs.terms.holding(tensors))


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
    score = _Scores(q, k, dtype, pairs)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(pairs.first, pairs.stop, B, H, H // G):
            if block.b <= block.a:
                y[block.rows, :, block.i : block.j] = 0
                continue
            queries = score.queries(q, block)
            out = total = None
            for a, b in block.tiles():
                keys, fades = score.keys(k, block, a, b), score.key_fades(block, a, b)
                scores, weights = score(queries, keys if fades is None else keys * fades, block, a, b)
                merged = partial or block.b - block.a > MAX_KEYS
                log = _log_sum(scores, weights) if merged else None
                if pairs.drop is not None:
                    weights.mul_(pairs.drop(weights, block, a))
                part = torch.bmm(weights, score.keys(v, block, a, b))
                if log is None:
                    out = part
                elif out is None or total is None:
                    out, total = part, log
                else:
                    out, total = merge(out, total, part, log)
            assert out is not None
            score.put(y, block, out)
            if total is not None:
                if log_sums is None:
                    log_sums = torch.empty(B, H, L, dtype=dtype, device=q.device)
                score.put(log_sums, block, total)
    return y, log_sums


def merge(y: Tensor, log: Tensor, more: Tensor, more_log: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over different keys as one, in the memory of both: ``(y, log sum)``, the logs of the results' shape or with a last axis of 1."""
    both = torch.logaddexp(log, more_log)
    return y.mul_((log - both).exp()).add_(more.mul_((more_log - both).exp())), both


def attend_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sums: Tensor | None,
    pairs: Pairs,
    partial: bool,
    dlog: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of ``q``, ``k``, ``v`` and the terms' tensors of :func:`attend`; but for ``q`` in at least float32.

    Args:
        dy, y: gradient and result, of partial ones those of the merged result.
        log_sums: over all keys that a query sees, of partial results the merged ones.
        dlog: gradient of ``log_sums``, where they are a result of their own.
    """
    (B, H, L, D), (_, G, S, E) = q.shape, v.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty(B, L, H, D, dtype=dtype if partial else q.dtype, device=q.device).transpose(1, 2)
    dk = torch.zeros(B, G, S, D, dtype=dtype, device=q.device)
    dv = torch.zeros(B, G, S, E, dtype=dtype, device=q.device)
    score = _Scores(q, k, dtype, pairs, gradient=True)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(pairs.first, pairs.stop, B, H, H // G):
            rows = block.rows
            if block.b <= block.a:
                dq[rows, :, block.i : block.j] = 0
                continue
            queries, gradient = score.queries(q, block), score.rows(dy, block)
            moved = None if dlog is None else score.rows(dlog[..., None], block)
            total = shared = None
            # One tile of all keys, whose weights sum to 1: what is subtracted from dY . V is the sum of just that, so that where one key has all the weight nothing remains, not a rounding.
            alone = block.b - block.a <= MAX_KEYS and (not partial or dlog is not None)
            if not alone:
                assert log_sums is not None
                total = score.rows(log_sums[..., None], block)
                shared = (gradient * score.rows(y, block)).sum(-1, keepdim=True)
                shared = shared if moved is None else shared.sub_(moved)
            dqueries: Tensor | None = None
            for a, b in block.tiles():
                keys, fades = score.keys(k, block, a, b), score.key_fades(block, a, b)
                keys = keys if fades is None else keys * fades
                scores, weights = score(queries, keys, block, a, b)
                dout, d = gradient, shared
                if total is not None and shared is not None:
                    # The weights sum to 1 over the tile, not over all keys; what they meet is scaled instead of them.
                    part = (_log_sum(scores, weights) - total).exp()
                    dout, d = gradient * part, shared * part
                factor = None if pairs.drop is None else pairs.drop(weights, block, a)
                met = weights if factor is None else weights * factor
                _add_product(dv[rows, :, a:b], met.transpose(1, 2), dout)
                values = score.keys(v, block, a, b).transpose(1, 2)
                if factor is None and d is not None:
                    torch.baddbmm(d.neg(), dout, values, out=scores).mul_(weights)
                else:
                    torch.bmm(dout, values, out=scores)
                    if factor is not None:
                        scores.mul_(factor)
                    if d is not None:
                        scores.sub_(d).mul_(weights)
                if d is None:
                    torch._softmax_backward_data(scores, weights, -1, scores.dtype, grad_input=scores)
                    if moved is not None:
                        scores.addcmul_(weights, moved)
                dscores = score.through(scores, block, a, b)
                found = torch.bmm(dscores, keys)
                dqueries = found if dqueries is None else dqueries.add_(found)
                _add_product(dk[rows, :, a:b], dscores.transpose(1, 2), queries, fades)
            assert dqueries is not None
            faded = score.fades(block)
            score.put(dq, block, dqueries.mul_(pairs.scale) if faded is None else dqueries.mul_(faded * pairs.scale))
    return dq, dk, dv, (None,) * 4 if score.added is None else score.added.gradients()


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, *tensors: Tensor | None) -> Tensor:
        y, log_sums = attend(q, k, v, _joined(pairs, tensors), partial=False)
        ctx.save_for_backward(q, k, v, y, log_sums, *tensors)
        ctx.pairs = pairs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums, *tensors = ctx.saved_tensors
        return _gradients(dy, q, k, v, y, log_sums, ctx.pairs, tensors, partial=False)


class _TiledPart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, log_sums = attend(q, k, v, _joined(pairs, tensors), partial=True)
        assert log_sums is not None
        ctx.save_for_backward(q, k, v, y, log_sums, *tensors)
        ctx.pairs = pairs
        return y, log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlog: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums, *tensors = ctx.saved_tensors
        return _gradients(dy, q, k, v, y, log_sums, ctx.pairs, tensors, partial=True, dlog=dlog)


def _gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sums: Tensor | None,
    pairs: Pairs,
    tensors: list[Tensor | None],
    partial: bool,
    dlog: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """What autograd is told of a call's ``q, k, v, pairs, *tensors``."""
    dq, dk, dv, found = attend_backward(dy, q, k, v, y, log_sums, _joined(pairs, tuple(tensors)), partial, dlog)
    taken = (None if d is None or t is None else d.to(t.dtype) for d, t in zip(found, tensors, strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, *taken


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """``total (rows, G, n, D) += a @ b``, times ``factor (n, D)``; a product that adds would be run head by head, since ``total`` is a part of something."""
    found = torch.bmm(a, b)
    total.add_((found if factor is None else found.mul_(factor)).view(total.shape))

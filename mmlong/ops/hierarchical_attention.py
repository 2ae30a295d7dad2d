"""Hierarchical softmax attention: what is near is seen token by token, what is far as averages of ever larger clusters.

Follows Zhu & Soricut 2021 (H-Transformer-1D, arXiv 2107.11906) as in the authors' own code. At level ``l`` a cluster is ``2^l`` tokens and a block ``n`` clusters. Two tokens meet at the lowest level at which their blocks
are the same or side by side:

    level(i, j) = min { l : |i // (n 2^l) - j // (n 2^l)| <= 1 }
    y_i = sum_j a_ij v_j / sum_j a_ij,      a_ij = exp(scale q_i^l . k_j^l),   l = level(i, j)

with ``q^l``, ``k^l`` those of the clusters that they are in: averages, made level by level; a cluster that the end of the sequence cuts short is the average of the halves that it has. So every pair counts
once, at one level; the weight of a cluster is its number of tokens; and where all tokens of each cluster are alike it is dense attention. Level by level that is, for a block of queries,

    level 0         its own block and both beside it, exactly
    level l >= 1    the two blocks beside it, but for the quarter whose pairs are side by side one level below

Causal, a token sees itself, its own block so far, and blocks to the left, whose clusters are complete when it comes. An average of queries would hold later ones: there ``q^l`` is the query of the cluster's
*first* token, as in the authors' decoder.

``n`` keys and a half at each of ``log2(L / n)`` levels, at ever fewer queries: work and memory are linear in the length. Levels are merged from the top by their log sums, so that each is written at its own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.block_attention import Blocks, block_attention

STRETCH_ELEMENTS = 1 << 17
"""Elements that are merged at a time on a CPU."""

Part = tuple[Tensor, Tensor]
"""Results over some keys, and the logarithms of their sums."""


def hierarchical_attention_reference(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool) -> Tensor:
    """The definition, with the full matrix of scores; arguments and result as :func:`hierarchical_attention`."""
    L = q.shape[2]
    i = torch.arange(L, device=q.device)
    scores = q.new_full((L, L), -math.inf).expand(*q.shape[:2], L, L).clone()
    met = torch.zeros(L, L, dtype=torch.bool, device=q.device)
    queries, keys, level = q, k, 0
    while not bool(met.all()):
        size = 2**level
        near = (i[:, None] // (block * size) - i // (block * size)).abs() <= 1
        of = i // size
        here = (queries[:, :, of] @ keys[:, :, of].transpose(-1, -2)) / math.sqrt(q.shape[-1])
        scores = torch.where(near & ~met, here, scores)
        met |= near
        queries, keys, level = queries[:, :, ::2] if causal else coarser(queries), coarser(keys), level + 1
    if causal:
        scores = scores.masked_fill(i > i[:, None], -math.inf)
    return scores.softmax(-1) @ v


def coarser(t: Tensor) -> Tensor:
    """Averages of pairs of ``(B, H, T, D)``; a last one without a partner stays."""
    pairs = t.shape[2] // 2
    found = _Average.apply(t[:, :, : 2 * pairs] if t.shape[2] % 2 else t)
    return torch.cat([found, t[:, :, -1:]], 2) if t.shape[2] % 2 else found


class _Average(torch.autograd.Function):
    """Written out, since a library's sum over an axis of 2 is slow."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        pairs = t.unflatten(2, (-1, 2))
        return torch.add(pairs[..., 0, :], pairs[..., 1, :]).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return (0.5 * d).repeat_interleave(2, 2)


@torch.compiler.disable
def hierarchical_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Every token sees all.

    Args:
        q, k: ``(B, H, L, D)``.
        v: ``(B, H, L, E)``.
        block: clusters ``n`` of a block, even.

    Returns:
        ``(B, H, L, E)``.
    """
    L = q.shape[2]
    parts = [_near(q, k, v, block)]
    scale, last = 1 / math.sqrt(q.shape[-1]), 1
    level = 1
    while (L - 1) >> level >= block:
        clusters = -(-L // 2**level)
        tokens, before = L - ((clusters - 1) << level), last
        q, k, pairs = coarser(q), coarser(k), v
        v = coarser(v)
        if tokens < 1 << level and pairs.shape[2] % 2 == 0:
            # The last two, of which the second is the smaller.
            mean = ((tokens - before) * pairs[:, :, -2:-1] + before * pairs[:, :, -1:]) / tokens
            v = torch.cat([v[:, :, :-1], mean], 2)
        last = tokens
        weighed = _weighed(q, k, math.log(tokens / 2**level) / scale) if tokens < 1 << level else (q, k)
        y, log_sums = _far(*weighed, v, block, scale)
        parts.append((y, log_sums + level * math.log(2)))
        level += 1
    return _from_the_top(parts, [0] * len(parts), L).to(v.dtype)


def _weighed(q: Tensor, k: Tensor, score: float) -> tuple[Tensor, Tensor]:
    """Another channel, which adds ``score`` to those of the last key."""
    more = torch.cat([k.new_zeros(*k.shape[:2], k.shape[2] - 1, 1), k.new_full((*k.shape[:2], 1, 1), score)], 2)
    return torch.cat([q, q.new_ones(*q.shape[:3], 1)], 3), torch.cat([k, more], 3)


def _near(q: Tensor, k: Tensor, v: Tensor, block: int) -> Part:
    """Level 0, both sides."""
    blocks = _listed(-(-q.shape[2] // block), q.shape[2], block, block, ((-1, 0, 1),), str(q.device))
    return block_attention(q, k, v, blocks)


def _far(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> Part:
    """A level above, both sides, by halves of blocks: of those of the two blocks beside it a half meets three."""
    half = block // 2
    lists = ((-2, 2, 3), (-3, -2, 2))
    blocks = _listed(-(-q.shape[2] // half), q.shape[2], half, half, lists, str(q.device))
    return block_attention(q, k, v, blocks, scale=scale)


@lru_cache(maxsize=64)
def _listed(n: int, S: int, q_size: int, k_size: int, apart: tuple[tuple[int, ...], ...], device: str) -> Blocks:
    """Lists of key blocks, all of whose pairs count.

    Args:
        n: blocks of queries.
        S: keys.
        apart: how far from its own number a block's list is; of the first, the second, ..., then again of the first.
    """
    columns = -(-S // k_size)
    own = np.arange(n)[:, None]
    lists = own + np.array(apart)[own[:, 0] % len(apart)]
    there = (lists >= 0) & (lists < columns)
    # What the end cuts short stands first, since it is masked; what is not there last.
    short = there & (lists == columns - 1) & (S % k_size > 0)
    order = np.argsort(np.where(there, ~short, 2), axis=1, kind="stable")
    keys = np.take_along_axis(np.where(there, lists, -1), order, 1)
    return Blocks(
        torch.from_numpy(keys)[None, None].to(device), q_size, k_size, counts=there.sum(1), masked=short.sum(1)
    )


def kept(seen: int, block: int) -> list[tuple[int, int]]:
    """Of every level the clusters ``first <= c < stop`` that a causal token after ``seen`` others may still see, or that others will be made of."""
    found: list[tuple[int, int]] = []
    while seen >> len(found) >= 1:
        stop = seen >> len(found)
        found.append((max(0, stop // block - 1) * block, stop))
    return found


def sampled(seen: int, block: int) -> int:
    """Levels above 0 at which the token after ``seen`` others sees something, so that it may need the query of its cluster's first token."""
    level = 0
    while seen >> (level + 1) >= block:
        level += 1
    return level


State = tuple[Tensor, Tensor, Tensor]
"""``q (B, H, sampled, D)``, the first query of the running cluster of every level above 0; ``k, v (B, H, S, D)``, averages of what is kept of every level, one level after the other."""


@torch.compiler.disable
def hierarchical_attention_causal(
    q: Tensor, k: Tensor, v: Tensor, block: int, past: int = 0, state: State | None = None
) -> tuple[Tensor, State]:
    """Every token sees those before it and itself; in pieces.

    Args:
        q, k, v, block: as :func:`hierarchical_attention` takes them, of the piece.
        past: tokens before the piece.
        state: what an earlier piece left behind, ``None`` if there is none.

    Returns:
        ``(y (B, H, T, E), state)``.
    """
    total = past + q.shape[2]
    keys, values = _levels(k, past, block, state and state[1]), _levels(v, past, block, state and state[2])
    queries = [q]
    while (total - 1) >> len(queries) >= block:
        queries.append(_firsts(q, past, len(queries), state and state[0]))
    if q.shape[2] == 1:
        y = _single(queries, keys, values, past, block).to(v.dtype)
    else:
        parts = [_near_causal(q, keys[0], values[0], past, block)]
        for level in range(1, len(queries)):
            y, log_sums = _far_causal(queries[level], keys[level], values[level], past >> level, block)
            parts.append((y, log_sums + level * math.log(2)))
        y = _from_the_top(parts, [past >> n for n in range(len(parts))], q.shape[2]).to(v.dtype)
    k, v = (_still(t, past, total, block) for t in (keys, values))
    running = [_running(q, past, n + 1, state and state[0]) for n in range(sampled(total, block))]
    samples = torch.cat(running, 2) if running else q[:, :, :0].clone()
    return y, (samples, k, v)


def _single(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], past: int, block: int) -> Tensor:
    """One token, by one softmax over what it sees at all levels, a few dozen keys each. Keys begin with the block before its own."""
    seen = [keys[0].shape[2]]
    for level in range(1, len(queries)):
        seen.append(block if (past >> level) % block >= block // 2 else block // 2)
    dtype = torch.promote_types(queries[0].dtype, torch.float32)
    k, v = (torch.cat([t[:, :, :n] for t, n in zip(line, seen, strict=False)], 2).to(dtype) for line in (keys, values))
    q = torch.cat([t.expand(-1, -1, n, -1) for t, n in zip(queries, seen, strict=True)], 2).to(dtype)
    scores = (q * k).sum(-1) / math.sqrt(q.shape[-1])
    weights = torch.cat([part + level * math.log(2) for level, part in enumerate(scores.split(seen, 2))], 2).softmax(2)
    return (weights[..., None] * v).sum(2, keepdim=True)


def _levels(t: Tensor, past: int, block: int, cache: Tensor | None) -> list[Tensor]:
    """Averages at every level, each from the first that was kept on."""
    total = past + t.shape[2]
    found: list[Tensor] = []
    used = 0
    before = kept(past, block)
    while total >> len(found) >= 1:
        level = len(found)
        first, stop = before[level] if level < len(before) else (0, 0)
        new = t
        if level:
            below = before[level - 1][0] if level - 1 < len(before) else 0
            new = coarser(found[-1][:, :, 2 * stop - below : 2 * (total >> level) - below])
        if cache is not None and stop > first:
            old = cache[:, :, used : used + stop - first]
            used += stop - first
            new = torch.cat([old.to(new.dtype), new], 2)
        found.append(new)
    return found


def _still(levels: list[Tensor], past: int, total: int, block: int) -> Tensor:
    """What is kept of all levels, in one line."""
    before = kept(past, block)
    parts = []
    for level, (first, stop) in enumerate(kept(total, block)):
        start = before[level][0] if level < len(before) else 0
        parts.append(levels[level][:, :, first - start : stop - start])
    return torch.cat(parts, 2)


def _firsts(q: Tensor, past: int, level: int, samples: Tensor | None) -> Tensor:
    """Queries of the clusters of the piece."""
    size = 1 << level
    found = q[:, :, -past % size :: size]
    if past % size == 0:
        return found
    return torch.cat([_sample(q, level, samples), found], 2)


def _sample(q: Tensor, level: int, samples: Tensor | None) -> Tensor:
    """The query of the cluster that ran when the piece began; anything where it sees nothing at this level."""
    if samples is None or level > samples.shape[2]:
        return torch.zeros_like(q[:, :, :1])
    return samples[:, :, level - 1 : level].to(q.dtype)


def _running(q: Tensor, past: int, level: int, samples: Tensor | None) -> Tensor:
    """The query of the cluster that runs when the piece has ended; anything where none does."""
    total = past + q.shape[2]
    first = total >> level << level
    if first == total:
        return torch.zeros_like(q[:, :, :1])
    return q[:, :, first - past : first - past + 1] if first >= past else _sample(q, level, samples)


def _near_causal(q: Tensor, k: Tensor, v: Tensor, past: int, block: int) -> Part:
    """Level 0 of a piece: the block so far and the one before it. Keys begin with a block."""
    front = past % block
    q = F.pad(q, (0, 0, front, 0))
    own = np.arange(-(-q.shape[2] // block)) + (past >= block)
    lists = np.stack([own, own - 1], 1)
    blocks = Blocks(
        torch.from_numpy(lists)[None, None].to(q.device), block, block, _not_later, counts=(lists >= 0).sum(1),
        masked=np.ones_like(own),
    )  # fmt: skip
    y, log_sums = block_attention(q, k, v, blocks)
    return y[:, :, front:], log_sums[:, :, front:]


def _not_later(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _far_causal(q: Tensor, k: Tensor, v: Tensor, first: int, block: int) -> Part:
    """A level above of a piece whose clusters begin with number ``first``: the block before a query's own, of which the first half of a block sees the first half. Keys begin with a block."""
    front, half = first % block, block // 2
    q = F.pad(q, (0, 0, front, 0))
    before = 2 * (np.arange(-(-q.shape[2] // block)) - (first < block))
    lists = np.stack([before + 1, before], 1)
    there = lists[:, 0] >= 0

    def sees(i: Tensor, j: Tensor) -> Tensor:
        return (i % block >= half) | (j % block < half)

    blocks = Blocks(
        torch.from_numpy(np.where(there[:, None], lists, -1))[None, None].to(q.device), block, half, sees,
        q_places=torch.arange(q.shape[2], device=q.device)[None, None], counts=2 * there, masked=there.astype(np.int64),
    )  # fmt: skip
    y, log_sums = block_attention(q, k, v, blocks)
    return y[:, :, front:], log_sums[:, :, front:]


class _Merge(torch.autograd.Function):
    """Results of clusters onto those of the two halves of each. In stretches that stay in the caches."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, log: Tensor, above: Tensor, log_above: Tensor) -> Part:
        log_above = log_above[..., None]
        log = log.unflatten(2, (-1, 2))
        # Shares are not exp(log - total): a large total is rounded by more than its parts differ.
        mine, theirs = torch.sigmoid(log - log_above), torch.sigmoid(log_above - log)
        y = y.contiguous()
        out = torch.empty_like(y)
        for at in _stretches(above):
            w, u = mine[at][..., None], theirs[at][..., None]
            torch.mul(_halves(y, at), w, out=_halves(out, at)).addcmul_(above[at].unsqueeze(-2), u)
        ctx.save_for_backward(y, above, mine, theirs)
        return out, torch.logaddexp(log, log_above).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dtotal: Tensor) -> tuple[Tensor, ...]:
        y, above, mine, theirs = ctx.saved_tensors
        dout = dout.contiguous()
        dtotal = dtotal.unflatten(2, (-1, 2))
        dy, dabove = torch.empty_like(y), torch.empty_like(above)
        dlog, dlog_above = torch.empty_like(mine), torch.empty_like(above[..., 0])
        for at in _stretches(above):
            d, w, u = _halves(dout, at), mine[at], theirs[at]
            by_mine, by_theirs = (d * _halves(y, at)).sum(-1), (d * above[at].unsqueeze(-2)).sum(-1)
            # A log sum moves the total by its share, and the result from one side to the other by the product of both.
            moved = u * w * (by_mine - by_theirs)
            dlog[at] = w * dtotal[at] + moved
            dlog_above[at] = (u * dtotal[at] - moved).sum(-1)
            torch.mul(d, w[..., None], out=_halves(dy, at))
            torch.mul(d[..., 0, :], u[..., 0, None], out=dabove[at]).addcmul_(d[..., 1, :], u[..., 1, None])
        return dy, dlog.flatten(2), dabove, dlog_above


Place = tuple[slice, slice, slice]


def _stretches(above: Tensor) -> Iterator[Place]:
    """Parts ``(rows, heads, clusters)``, on a CPU small ones."""
    B, H, T, E = above.shape
    if above.device.type != "cpu":
        yield slice(0, B), slice(0, H), slice(0, T)
        return
    step = max(1, STRETCH_ELEMENTS // (2 * E))
    heads = max(1, step // max(T, 1))
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, T, step):
                yield slice(b, b + 1), slice(h, h + heads), slice(i, i + step)


def _halves(t: Tensor, at: Place) -> Tensor:
    """A part of ``(B, H, 2 T, E)`` as ``(rows, heads, clusters, 2, E)``."""
    return t.unflatten(2, (-1, 2))[at]


def _from_the_top(parts: list[Part], firsts: list[int], length: int) -> Tensor:
    """Levels as one.

    Args:
        parts: of each level from 0, results ``(B, H, T_l, E)`` at the clusters of some tokens.
        firsts: index of the first cluster of each, ``firsts[l - 1] // 2 = firsts[l]``.
        length: tokens of level 0.
    """
    above, log_above = parts[-1]
    if len(parts) == 1:
        return above[:, :, :length]
    above = above.to(log_above.dtype)
    for (y, log), first in zip(parts[-2::-1], firsts[-2::-1], strict=True):
        before, T = first % 2, y.shape[2]
        after = (before + T) % 2
        y = y.to(log.dtype)
        if before or after:
            y, log = F.pad(y, (0, 0, before, after)), F.pad(log, (before, after))
        above, log_above = _Merge.apply(y, log, above[:, :, : y.shape[2] // 2], log_above[:, :, : y.shape[2] // 2])
        above, log_above = above[:, :, before : before + T], log_above[:, :, before : before + T]
    return above[:, :, :length]

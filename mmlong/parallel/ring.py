"""Softmax attention in a ring: every rank's queries over the keys of all ranks before it, one piece of keys at a time.

Follows Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889), for causal sequences. A rank sends its keys and values to the next, which hands on what it gets; what
each has computed over one piece is merged with what it has by log-sum-exp (:mod:`mmlong.ops.tiled_attention`). So a rank holds two pieces of keys and values at most, whatever the length, and a piece is under
way while the one before it is worked on. In the backward the pieces go round once more, followed by the gradients that they have gathered, which the last rank sends home.

Departures: the ranks are a chain, as keys of later ranks are not seen; so rank r works on r + 1 pieces, and the last decides the time. (The paper deals with whole rows as well; to even out the causal work, a
sequence would have to be dealt out in a folded order, which no other mixer here could use.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.tiled_attention import Pairs, attend, attend_backward, merge
from mmlong.parallel.links import Links


def ring_attention(q: Tensor, k: Tensor, v: Tensor, links: Links, begins: Tensor) -> Tensor:
    """Causal attention of this rank's queries over the keys of this rank and of all before it.

    A collective, as its backward is.

    Args:
        q: ``(B, H, l, D)``, of this rank's piece of ``l`` positions.
        k, v: ``(B, G, l, D)``, G dividing H.
        links: to the other ranks.
        begins: int64 ``(B, l)``, where each token's document begins in the whole row.

    Returns:
        ``(B, H, l, D)``; at padding anything finite.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    return _Ring.apply(links, links.anchor(), q, k, v, begins, 1 / math.sqrt(q.shape[-1]))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, links: Links, anchor: Tensor, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, scale: float
    ) -> Tensor:
        y, log = attend(q, k, v, _own(links, begins, scale), partial=True)
        assert log is not None
        for place, keys, values in _pieces(links, k, v):
            part, part_log = attend(q, keys, values, _earlier(links, place, begins, scale), partial=True)
            assert part_log is not None
            y, log = merge(y, log[..., None], part, part_log[..., None])
            log = log[..., 0]
        links.finish()
        y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, log, begins)
        ctx.links, ctx.scale = links, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log, begins = ctx.saved_tensors
        links, scale = ctx.links, ctx.scale
        dq, dk, dv, _ = attend_backward(dy, q, k, v, y, log, _own(links, begins, scale), partial=True)
        for place, keys, values in _pieces(links, k, v):
            pairs = _earlier(links, place, begins, scale)
            more, dkeys, dvalues, _ = attend_backward(dy, q, keys, values, y, log, pairs, partial=True)
            dq += more
            if place < links.rank - 1:
                # What the ranks between have added; the piece's own rank adds its part at home.
                for total, came in zip((dkeys, dvalues), links.take([dkeys, dvalues], links.rank - 1), strict=True):
                    total += came
            links.hand([dkeys, dvalues], place if links.last else links.rank + 1)
        if not links.last:
            for total, came in zip((dk, dv), links.take([dk, dv], links.size - 1), strict=True):
                total += came
        links.finish()
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _pieces(links: Links, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``(rank, keys, values)`` of the ranks before, the nearest first; own keys and all that come are handed on."""
    if not links.last:
        links.hand([k, v], links.rank + 1)
    for place in reversed(range(links.rank)):
        shapes = [(*t.shape[:2], links.lengths[place], t.shape[3]) for t in (k, v)]
        keys, values = links.take([t.new_empty(s) for t, s in zip((k, v), shapes, strict=True)], links.rank - 1)
        if not links.last:
            links.hand([keys, values], links.rank + 1)
        yield place, keys, values


def _own(links: Links, begins: Tensor, scale: float) -> Pairs:
    here = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
    return Pairs((begins - links.start).clamp_min(0), here + 1, scale)


def _earlier(links: Links, place: int, begins: Tensor, scale: float) -> Pairs:
    length = links.lengths[place]
    first = (begins - sum(links.lengths[:place])).clamp(0, length)
    return Pairs(first, torch.full_like(first, length), scale)

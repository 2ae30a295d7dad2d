"""Levels of a Fenwick tree: into which buckets a count of tokens parts what came before.

The token of index ``t`` (from 0 in its document) parts the tokens before it by the binary digits of ``t``: for each digit ``b`` that is one, the bucket ``b`` of ``2^b`` tokens, the longest ones
earliest (Fenwick 1994). So the token ``s < t`` is in the bucket of the highest digit in which ``s`` and ``t`` differ, and its *level* is that digit's place counted from 1; a token's own level is 0:

    level(t, s) = bit_length(t xor s)                        13 = 1101b:  0-7 | 8-11 | 12 |
                                                              level          4     3     1   0 (13 itself)

From ``t`` to ``t + 1`` the buckets of the trailing ones of ``t`` and ``t`` itself become one, as a counter carries. With ``K`` levels, the last one, ``K - 1``, holds whatever is further: a bucket that is never merged.

All numbers here are of levels, 0 to ``K - 1``; the bucket of level ``l`` is kept at place ``l - 1`` of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def level(t: Tensor, s: Tensor, levels: int) -> Tensor:
    """Level at which the token ``t`` sees ``s``, at most ``levels - 1``."""
    powers = torch.ones(levels - 1, dtype=torch.int64, device=t.device) << torch.arange(levels - 1, device=t.device)
    return torch.bucketize((t ^ s).contiguous(), powers, right=True)


@dataclass(frozen=True)
class Walk:
    """Where some chunks of ``T`` tokens stand in the counts of their documents. Shapes are ``(n, R, .)``: ``n`` chunks one after another, ``R`` rows or 1 for all alike.

    A chunk writes into a few slots. Tokens of a chunk are at fewer than ``2^p`` from its end: those that differ from the count at the end only in the last ``p`` digits are at one of ``p`` levels,
    and all others at one and the same.

    Attributes:
        within: level of each pair of tokens ``(n, R, T, T)``.
        read: level at which each token sees the buckets that stood before the chunk ``(n, R, T, K - 1)``.
        slot: which slot each token is written into ``(n, R, T)``.
        slots: how many there are.
        to: level of what is in each slot after the chunk ``(n, R, slots)``.
        moved: level after the chunk of the buckets that stood before it ``(n, R, K - 1)``.
        before, after: whether a bucket can have something in it before and after the chunk, bool ``(n, R, K - 1)``.
    """

    within: Tensor
    read: Tensor
    slot: Tensor
    slots: int
    to: Tensor
    moved: Tensor
    before: Tensor
    after: Tensor


def walk(index: Tensor, before: Tensor, after: Tensor, levels: int) -> Walk:
    """Levels over some chunks.

    Args:
        index: int64 ``(n, R, T)``, of each token in its document.
        before: int64 ``(n, R)``, tokens of the document that the chunk begins in, before it.
        after: int64 ``(n, R)``, tokens of the document that the chunk ends in, up to its end.
        levels: K.

    Returns:
        The levels; anything for tokens of another document than that which the chunk begins (``read``) or ends in (``slot``).
    """
    T, device = index.shape[-1], index.device
    buckets = torch.arange(1, levels, device=device)
    carried = level(index, before[..., None], levels)
    p = (T - 1).bit_length()
    slots = min(p + 1, levels - 1)
    # The level of the last slot: where the digits before the last p have their lowest one.
    far = level(after, (after - (1 << p)).clamp_min(0), levels).clamp_min(1)
    places = torch.arange(1, slots + 1, device=device)
    return Walk(
        within=level(index[..., :, None], index[..., None, :], levels),
        read=torch.maximum(buckets, carried[..., None]),
        slot=(level(after[..., None], index, levels) - 1).clamp(0, slots - 1),
        slots=slots,
        to=torch.where(places < slots, places, far[..., None]),
        moved=torch.maximum(buckets, level(before, after, levels)[..., None]),
        before=standing(before, levels),
        after=standing(after, levels),
    )


def standing(count: Tensor, levels: int) -> Tensor:
    """Which buckets have something in them after ``count (...)`` tokens: bool ``(..., levels - 1)``."""
    digits = count[..., None] >> torch.arange(levels - 1, device=count.device)
    return torch.cat([digits[..., :-1] & 1 == 1, digits[..., -1:] > 0], -1)

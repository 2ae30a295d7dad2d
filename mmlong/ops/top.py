"""The ``k`` largest of a row of scores, of equals the first: the same however the row was come by.

``torch.topk`` leaves open which of several equal scores it takes. Where a sequence run whole and in pieces must select alike, that is not enough: equal scores are common (keys that no head of an indexer likes all
score 0, tokens may repeat), so here the lower index wins. Scores of ``-inf`` are never taken, so that a row may yield fewer than ``k``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEW = 16
"""Where less than one in so many is taken, a heap of the largest finds the threshold in less time than a partition of all."""


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ``k`` largest of each row, and by what to know them again.

    Args:
        scores: ``(.., n)``.
        k: how many, at least 1.

    Returns:
        ``mask``, bool like ``scores``, of a row with fewer than ``k`` above ``-inf`` all of it; ``least (.., 1)``, the smallest score taken; and int64 ``last (.., 1)``, the place up to which those that equal it are taken, ``None`` if that is all of them in every row.
    """
    n = scores.shape[-1]
    if k >= n:
        least = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        return scores >= least, least, None
    if k * FEW <= n:
        least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    else:
        least = scores.kthvalue(n - k + 1, keepdim=True).values
    mask = scores >= least
    count = mask.sum(-1, keepdim=True)
    surplus = (count > k) & (least > -math.inf)
    asked = can_ask(scores)
    if asked and not bool(surplus.any()):
        return mask, least, None
    equal = scores == least
    equals = equal.sum(-1, keepdim=True)
    room = k - count + equals
    if asked:
        # Of each row, the one that takes up the room, in a list of all the equals of all rows.
        _, place = equal.view(-1, n).nonzero(as_tuple=True)
        last = place[(equals.flatten().cumsum(0) - equals.flatten() + room.flatten() - 1)].view(least.shape)
    else:
        here = torch.arange(n, device=scores.device)
        last = torch.where(equal & (equal.cumsum(-1) <= room), here, -1).amax(-1, keepdim=True)
    last = torch.where(surplus, last, n)
    return _without(mask, equal, last), least, last


def again(scores: Tensor, least: Tensor, last: Tensor | None) -> Tensor:
    """The mask of :func:`select` from what it returned beside it."""
    mask = scores >= least
    return mask if last is None else _without(mask, scores == least, last)


def _without(mask: Tensor, equal: Tensor, last: Tensor) -> Tensor:
    """A mask without those of ``equal`` that are after ``last``."""
    n = mask.shape[-1]
    if not can_ask(mask):
        return mask & ~(equal & (torch.arange(n, device=mask.device) > last))
    row, place = equal.view(-1, n).nonzero(as_tuple=True)
    late = place > last.flatten()[row]
    mask.view(-1, n)[row[late], place[late]] = False
    return mask


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Bool like ``scores (.., n)``: the ``k`` largest of each row, fewer where fewer are above ``-inf``."""
    return (scores > -math.inf) & select(scores, k)[0]


def top_indices(scores: Tensor, k: int) -> Tensor:
    """int64 ``(.., k)``: where the ``k`` largest of each row of ``scores (.., n)`` are, in any order; -1 in place of those that are ``-inf`` or not there."""
    n = scores.shape[-1]
    if n < k:
        return torch.nn.functional.pad(top_indices(scores, n), (0, k - n), value=-1)
    if k == 0:
        return scores.new_empty(*scores.shape[:-1], 0, dtype=torch.long)
    values, index = scores.topk(k)
    index = index.masked_fill(values == -math.inf, -1)
    least = values[..., -1:]
    if can_ask(scores):
        tied = ((scores == least).sum(-1) > (values == least).sum(-1)) & (least[..., 0] > -math.inf)
        if not bool(tied.any()):
            return index
    # Places as numbers that are the larger the earlier, and 0 for what is not taken.
    early = torch.arange(n, 0, -1, device=scores.device)
    taken = torch.where(top_mask(scores, k), early, 0).topk(k).values
    return torch.where(taken > 0, n - taken, -1)


def can_ask(t: Tensor) -> bool:
    """Whether looking at a value costs nothing: neither a device nor a compiler has to stop for it."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()

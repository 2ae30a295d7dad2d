"""The best of each document: of ``n`` tokens those ``k = ceil(share n)`` with the highest scores, and how far each token is among them.

Definitions, of a document's scores ``s`` (of equal ones the earlier is the higher; padding takes no part):

    top_share(s)_t       whether fewer than k tokens are higher than t
    soft_top_share(s)_t  = min(1, exp(s_t + a)),   a such that they add up to k

The second is the solution of  max_p p . s + H(p),  0 <= p <= 1,  sum p = k,  which has a gradient (Lei et al. 2023, arXiv 2304.04947, where it is approached by iterating ``a = log k - log sum exp(s + b), b = min(-s - a, 0)``). Here it is found exactly: with the tokens sorted, the ``m`` highest are 1 and

    a = log(k - m) - log sum_{others} exp(s),      m the least for which no other exceeds 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlong.layout import Layout


def check_share(share: float, what: str) -> None:
    """Raise ``ValueError`` naming ``what`` unless a share is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise ValueError(f"{what} takes a share of the tokens above 0 and at most 1, got {share}")


def _documents(layout: Layout | None, rows: int, length: int, device: torch.device) -> Tensor:
    """int64 ``(B, L)``: which document of its row a token is in, from 0 to L; L + 1 at padding."""
    found = torch.zeros(rows, length, dtype=torch.long, device=device)
    if layout is None:
        return found
    valid = layout.valid(length)
    if layout.resets is not None:
        found = layout.resets.cumsum(1)
    return found if valid is None else torch.where(valid, found, length + 1)


def _sizes(document: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """``n`` and ``k`` of each document of a row, int64 ``(B, L + 2)``, padding being the last; its k is 0."""
    n = document.new_zeros(document.shape[0], document.shape[1] + 2)
    n = n.scatter_add(1, document, torch.ones_like(document))
    # In float64, less a little: a tenth of ten is 1 and not 2.
    k = (n.double() * share - 1e-9).ceil().long().clamp_min(1) * (n > 0)
    k[:, -1] = 0
    return n, k


def _ranked(scores: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """``(order, rank)``, int64 ``(B, L)``: tokens by document and falling score, and how many of its document are before each in that order."""
    L = scores.shape[1]
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, document.gather(1, order).argsort(dim=1, stable=True))
    n, _ = _sizes(document, 1.0)
    begins = (n.cumsum(1) - n).gather(1, document.gather(1, order))
    place = torch.arange(L, device=scores.device) - begins
    return order, torch.zeros_like(order).scatter(1, order, place)


def count_top_share(share: float, layout: Layout | None, rows: int, length: int, device: torch.device) -> int:
    """How many tokens :func:`top_share` picks in all; the scores do not matter."""
    if layout is None or (layout.lengths is None and layout.resets is None):
        return rows * max(1, math.ceil(length * share - 1e-9))
    return int(_sizes(_documents(layout, rows, length, device), share)[1].sum())


def top_share(scores: Tensor, share: float, layout: Layout | None = None) -> Tensor:
    """The highest of each document.

    Args:
        scores: real ``(B, L)``.
        share: of a document's tokens, above 0 and at most 1.
        layout: of the tokens.

    Returns:
        bool ``(B, L)``; false at padding.
    """
    document = _documents(layout, scores.shape[0], scores.shape[1], scores.device)
    _, k = _sizes(document, share)
    return _ranked(scores, document)[1] < k.gather(1, document)


def soft_top_share(scores: Tensor, share: float, layout: Layout | None = None) -> Tensor:
    """How far each token is among the highest of its document: ``(B, L)`` in [0, 1], adding up to ``k`` in each; zeros at padding. Arguments as :func:`top_share`."""
    (B, L), device = scores.shape, scores.device
    document = _documents(layout, B, L, device)
    padding = document == L + 1
    _, k = _sizes(document, share)
    order, rank = _ranked(scores.detach(), document)
    here = document.gather(1, order)
    # log sum exp over each token and the lower ones of its document, by doubling.
    lower = scores.detach().gather(1, order)
    step = 1
    while step < L:
        same = here[:, step:] == here[:, :-step]
        joined = torch.where(same, torch.logaddexp(lower[:, :-step], lower[:, step:]), lower[:, :-step])
        lower, step = torch.cat([joined, lower[:, -step:]], 1), 2 * step
    left = k.gather(1, here) - rank.gather(1, order)
    fits = (left > 0) & (scores.detach().gather(1, order) + left.clamp_min(1).log() <= lower)
    # The first that fits; the k-th does at the latest.
    m = torch.full_like(k, L).scatter_reduce(1, here, torch.where(fits, rank.gather(1, order), L), "amin")
    full = rank < m.gather(1, document)
    full, free = full & ~padding, (k - m).clamp_min(1).to(scores.dtype).gather(1, document)
    rest = scores.masked_fill(full | padding, -torch.inf)
    highest = torch.full_like(k, -torch.inf, dtype=scores.dtype).scatter_reduce(1, document, rest.detach(), "amax")
    # Padding alone has none.
    mass = torch.exp(rest - highest.gather(1, document).masked_fill(padding, 0))
    sums = torch.zeros_like(highest).scatter_add(1, document, mass).gather(1, document)
    found = torch.where(full, 1.0, free * mass / sums.masked_fill(padding, 1))
    return torch.where(padding, 0.0, found)

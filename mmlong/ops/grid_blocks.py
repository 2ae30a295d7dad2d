"""Attention within rectangles of a grid: a block of cells sees the cells around it, in any order in which tokens come.

Definition, where token ``i`` is the cell ``(r_i, c_i)`` and blocks of ``h x w`` cells begin at the grid's corner:

    R_i = (r_i // h) h;   C_i = (c_i // w) w
    i sees j   if   R_i - above <= r_j < R_i + h + below   and   C_i - side <= c_j < C_i + w + side   and   t_j <= t_i

with ``t`` the place of a token in the sequence; the last condition is the causal form's alone (Parmar et al. 2018, arXiv 1802.05751, section 3.3).

Queries are laid out block by block and keys in smaller blocks, of which a rectangle holds whole ones, so the pattern on the grid is a list of blocks (:mod:`mmlong.ops.block_attention`) and the only thing that is masked is time. A few queries
over a few keys are taken as they come, under an explicit mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.block_attention import Blocks, block_attention
from mmlong.ops.places import gather, spread

MASK_ELEMENTS = 1 << 16
"""An explicit mask of up to this many elements is the fastest way."""


@dataclass(frozen=True)
class Rectangle:
    """What a block sees: its own ``h x w`` cells, and so many rows above and below and columns to either side."""

    h: int
    w: int
    above: int
    below: int
    side: int

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool, from cells ``(..., 2)``, broadcast."""
        (r, c), (i, j) = (t.unbind(-1) for t in (queries, keys))
        r, c = r // self.h * self.h, c // self.w * self.w
        return (
            (i >= r - self.above) & (i < r + self.h + self.below) & (j >= c - self.side) & (j < c + self.w + self.side)
        )

    @property
    def key_block(self) -> tuple[int, int]:
        """Cells of a block of keys, so that rectangles begin and end at their edges."""
        return math.gcd(self.h, self.above, self.below), math.gcd(self.w, self.side)


@dataclass(frozen=True)
class Span:
    """The rows ``first <= r < stop`` of a grid of ``width`` columns in which tokens lie."""

    first: int
    stop: int
    width: int


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    spans: tuple[Span, Span],
    rectangle: Rectangle,
    causal: bool,
) -> Tensor:
    """Attention within rectangles.

    Args:
        q: ``(B, H, L, D)``.
        k, v: ``(B, H, S, D)``, S >= L; the last key belongs to the last query, and the keys stand in the order of time.
        queries, keys: int64 cells ``(1 or B, L, 2)`` and ``(1 or B, S, 2)``, none twice in a row.
        spans: in which rows, and of how many columns, the queries lie, and the keys.
        rectangle: who sees whom.
        causal: later keys are not seen.

    Returns:
        ``(B, H, L, D)``.
    """
    (L, S), rows = (q.shape[2], k.shape[2]), keys.shape[0]
    if rows * L * S <= MASK_ELEMENTS:
        mask = rectangle.sees(queries[:, :, None], keys[:, None])
        if causal:
            mask = mask & torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None])
    return _in_blocks(q, k, v, queries, keys, spans, rectangle, causal)


@torch.compiler.disable
def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    spans: tuple[Span, Span],
    rectangle: Rectangle,
    causal: bool,
) -> Tensor:
    """The same as lists of blocks."""
    (B, H, L, D), S = q.shape, k.shape[2]
    h, w = rectangle.h, rectangle.w
    # Both begin at the edge of a block of queries, so that lists are made of numbers alone.
    asked, held = (_rounded(span, h, w) for span in spans)
    kh, kw = rectangle.key_block
    q_slots, k_slots = _slots(queries, asked, h, w), _slots(keys, held, kh, kw)
    q_size, k_size = ((s.stop - s.first) * s.width for s in (asked, held))
    listed, counts = _lists(rectangle, asked, held)
    blocks = Blocks(
        torch.from_numpy(listed)[None, None].to(q.device),
        h * w,
        kh * kw,
        _earlier if causal else None,
        q_places=_times(q_slots, q_size, S - L),
        k_places=_times(k_slots, k_size, 0),
        counts=counts,
    )
    asking, shown, told = _laid(q, q_slots, q_size), _laid(k, k_slots, k_size), _laid(v, k_slots, k_size)
    y, _ = block_attention(asking, shown, told, blocks)
    y = gather(y.transpose(1, 2).flatten(2), q_slots.expand(B, -1))
    return y.unflatten(-1, (H, D)).transpose(1, 2)


def _earlier(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _rounded(span: Span, h: int, w: int) -> Span:
    return Span(span.first // h * h, -(-span.stop // h) * h, -(-span.width // w) * w)


def _slots(cells: Tensor, span: Span, h: int, w: int) -> Tensor:
    """Where each cell stands when the rows of a span are laid out in blocks of ``h x w``."""
    r, c = (cells[..., 0] - span.first), cells[..., 1]
    return ((r // h) * (span.width // w) + c // w) * (h * w) + (r % h) * w + c % w


def _times(slots: Tensor, size: int, start: int) -> Tensor:
    """``(1 or B, 1, size)``: the time of what stands in each slot, -1 in those that are empty."""
    times = torch.arange(start, start + slots.shape[1], device=slots.device).expand(slots.shape[0], -1)
    return torch.full((slots.shape[0], size), -1, device=slots.device).scatter(1, slots, times)[:, None]


def _laid(t: Tensor, slots: Tensor, size: int) -> Tensor:
    """``(B, H, L, D)`` with every token in its slot."""
    B, H, _, D = t.shape
    laid = spread(t.transpose(1, 2).flatten(2), slots.expand(B, -1), size)
    return laid.unflatten(-1, (H, D)).transpose(1, 2)


@lru_cache(maxsize=64)
def _lists(rectangle: Rectangle, asked: Span, held: Span) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys the rectangle of each block of queries holds, -1 after the last; and how many."""
    h, w, (kh, kw) = rectangle.h, rectangle.w, rectangle.key_block
    found: list[np.ndarray] = []
    columns = held.width // kw
    for r in range(asked.first, asked.stop, h):
        top = max(r - rectangle.above, held.first)
        rows = np.arange((top - held.first) // kh, (min(r + h + rectangle.below, held.stop) - held.first) // kh)
        for c in range(0, asked.width, w):
            across = np.arange(max(c - rectangle.side, 0) // kw, min(c + w + rectangle.side, held.width) // kw)
            found.append((rows[:, None] * columns + across).reshape(-1))
    counts = np.array([len(some) for some in found])
    keys = np.full((len(found), max(1, int(counts.max()))), -1, np.int64)
    for row, some in zip(keys, found, strict=True):
        row[: len(some)] = some
    return keys, counts

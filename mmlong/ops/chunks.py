"""Chunks: runs of tokens, taken as one token each and given back, in batches whose rows and documents are cut wherever they like.

Definition, with ``b_t`` true where token ``t`` begins a chunk (a document's first token always does) and ``g(t)`` the number of the chunk that token ``t`` is in, counted in its row from 0:

    take(x)_g = x_t,   t the token that begins chunk g;            give(z)_t = z_{g(t)}

A piece may begin inside a chunk, whose number is then -1, and ``give`` is told what that one has. The chunks are a sequence of their own, with a layout of their own: lengths where rows have different numbers of them, resets where a document begins.

Tokens picked one by one (:func:`picked_at`) are the same with a difference: a document need not begin with one, and may have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.known import followed


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks that begin in a piece.

    Attributes:
        index: int64 ``(B, L)``, the chunk of each token; -1: the one that was open before. At padding the last.
        first: int64 ``(B, G)``, the token with which each begins; of chunks that a row does not have any.
        layout: of the chunks; ``None`` if all rows have G of one document.
    """

    index: Tensor
    first: Tensor
    layout: Layout | None

    @property
    def count(self) -> int:
        """G, chunks of the row with most."""
        return self.first.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, G, D)``."""
        return x.gather(1, self.first[..., None].expand(-1, -1, x.shape[2]))

    def give(self, z: Tensor, before: Tensor) -> Tensor:
        """``(B, G, D)`` to ``(B, L, D)``; ``before (B, D)`` to tokens of the chunk that was open."""
        known = torch.cat([before[:, None].to(z.dtype), z], 1)
        return known.gather(1, (self.index + 1)[..., None].expand(-1, -1, z.shape[2]))

    def last(self, z: Tensor, before: Tensor) -> Tensor:
        """``(B, D)``: what the chunk has that is open after the piece."""
        known = torch.cat([before[:, None].to(z.dtype), z], 1)
        return known.gather(1, (self.index[:, -1] + 1)[:, None, None].expand(-1, 1, z.shape[2]))[:, 0]


def begun_at(starts: Tensor, layout: Layout | None, aimed: float = 1.0) -> Chunks:
    """The chunks that begin where told.

    Args:
        starts: bool ``(B, L)``; true at every document's first token. What it says at padding does not count.
        layout: of the tokens.
        aimed: share of tokens that are supposed to begin one where a step is followed and values are not known.
    """
    return picked_at(starts, layout, None, aimed)[0]


def picked_at(
    starts: Tensor, layout: Layout | None, waiting: Tensor | None, aimed: float = 1.0
) -> tuple[Chunks, Tensor | None]:
    """The same for any tokens.

    Args:
        starts: bool ``(B, L)``, what is picked.
        layout: of the tokens.
        waiting: bool ``(B,)``: a document has begun before the piece of which nothing is picked yet, while something of an earlier one was; ``None``: nowhere.
        aimed: see :func:`begun_at`.

    Returns:
        the chunks, and ``waiting`` after the piece (``None``: nowhere).
    """
    (B, L), device = starts.shape, starts.device
    valid = None if layout is None else layout.valid(L)
    starts = starts if valid is None else starts & valid
    index = (starts.long() if L == 1 else starts.cumsum(1)) - 1
    if L == 1:
        first = torch.zeros_like(index)  # a token that is drawn
    else:
        # The places of true values, in order, and then of the others.
        first = starts.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    marks = None if layout is None else layout.resets
    if followed():
        G = max(1, math.ceil(aimed * L))
        # Real ones, that code may look at: rows of one document, which are padded and marked wherever rows may be.
        lengths = torch.full((B,), G, device=device) if B > 1 or valid is not None else None
        resets = None if marks is None and waiting is None else torch.zeros(B, G, dtype=torch.bool, device=device)
        return _chunks(index, first[:, :G], lengths, resets), waiting
    if waiting is not None and not bool(waiting.any()):
        waiting = None  # so that rows that are alike stay so
    counts = starts.sum(1)
    G = int(counts.max())
    first = first[:, :G]
    lengths = None if B == 1 or G == 0 or bool((counts == G).all()) else counts
    if marks is None and waiting is None:
        return _chunks(index, first, lengths, None), None
    # Documents begun: what is picked begins one if that many more have begun than at what was picked before it.
    begun = torch.zeros_like(index)
    if marks is not None:
        begun = (marks if valid is None else marks & valid).cumsum(1)
    if waiting is not None:
        begun = begun + waiting[:, None].to(begun.dtype)
    there = torch.arange(G, device=device) < counts[:, None]
    known = torch.where(there, begun.gather(1, first), 0)
    resets = there & (known > torch.cat([known.new_zeros(B, 1), known[:, :-1]], 1)[:, :G])
    last = known.amax(1) if G else known.new_zeros(B)
    return _chunks(index, first, lengths, resets), begun[:, -1] > last


def _chunks(index: Tensor, first: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Chunks:
    none = lengths is None and resets is None
    return Chunks(index, first, None if none else Layout(lengths=lengths, resets=resets))

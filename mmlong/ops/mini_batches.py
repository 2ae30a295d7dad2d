"""Mini-batches of tokens that follow each document from its first token on, whatever piece of it a call sees.

A mechanism that learns by mini-batches of ``size`` tokens counts them from where a document begins. A piece of a sequence may begin inside one, several documents may begin in it, and rows end where
they like. :class:`Frames` lays the tokens out so that one frame of ``size`` slots holds one mini-batch, the token of place ``i`` in slot ``i``; slots without a token are marked. So a loop over
frames sees whole mini-batches only, and documents begin only where a frame begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlong.layout import Layout


@dataclass(frozen=True)
class Frames:
    """Where tokens ``(B, L)`` stand in ``n`` frames of ``slots``.

    Attributes:
        n, slots: frames, and slots of each.
        place: int64 ``(1 or B, n, slots)``, the place of a slot's token in its mini-batch.
        there: bool ``(B, n, slots)``, true where a slot has a token; ``None`` where all have.
        fresh: bool ``(B, n)``, true where a document begins; ``None`` where none does.
        closes: bool ``(B, n)``, true where a frame holds its mini-batch's last token; ``None`` where all do.
        source: int64 ``(B, n * slots)``, the token in a slot, L for none; ``None`` where slots are tokens in order.
        slot: int64 ``(B, L)``, the slot of a token, ``n * slots`` for none; ``None`` likewise.
    """

    n: int
    slots: int
    place: Tensor
    there: Tensor | None = None
    fresh: Tensor | None = None
    closes: Tensor | None = None
    source: Tensor | None = None
    slot: Tensor | None = None

    def cut(self, t: Tensor) -> Tensor:
        """Tokens ``(B, L, H, C)`` as frames ``(n, B H, slots, C)``, zero where there is none."""
        if self.source is not None:
            t = _pick(t, self.source)
        return t.unflatten(1, (self.n, self.slots)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def join(self, t: Tensor, heads: int) -> Tensor:
        """What :meth:`cut` did, undone; zero at padding."""
        t = t.unflatten(1, (-1, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return t if self.slot is None else _pick(t, self.slot)

    def each(self, flags: Tensor | None, heads: int) -> Tensor | None:
        """Flags of frames ``(B, n)`` beside states ``(B H, N, P)`` of a frame: ``(n, B H, 1, 1)``."""
        return None if flags is None else flags.mT.repeat_interleave(heads, 1)[..., None, None]


def _pick(t: Tensor, index: Tensor) -> Tensor:
    """Positions ``index (B, K)`` of ``t (B, L, ...)``, of which position L is zero."""
    B, L = t.shape[:2]
    longer = torch.cat([t, torch.zeros_like(t[:, :1])], 1).flatten(0, 1)
    rows = torch.arange(B, device=t.device)[:, None] * (L + 1)
    return longer.index_select(0, (index + rows).flatten()).unflatten(0, index.shape)


def whole_frames(n: int, size: int, device: torch.device) -> Frames:
    """Full mini-batches in order."""
    return Frames(n, size, torch.arange(size, device=device).expand(1, n, size))


def lay_out(place: Tensor, layout: Layout | None, size: int) -> Frames:
    """Tokens at any places.

    Args:
        place: int64 ``(B, L)``, the place of each token in its mini-batch; a document begins at place 0.
        layout: lengths and resets are honoured.
        size: tokens of a mini-batch.
    """
    B, L = place.shape
    valid = None if layout is None else layout.valid(L)
    valid = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
    resets = None if layout is None else layout.resets
    if L == 1:
        # One token is a frame of its own: nothing is computed for slots that have none.
        fresh = None if resets is None else resets & valid
        return Frames(1, 1, place[:, None], valid[:, None], fresh, valid & (place == size - 1))
    begins = (place == 0) & valid
    frame = begins.long().cumsum(1) - begins[:, :1].long()
    if torch.compiler.is_compiling() and resets is None:
        n = -(-(L + size - 1) // size)  # the most that there can be, whatever the places are
    else:
        n = int(torch.where(valid, frame, 0).max()) + 1
    slot = torch.where(valid, frame * size + place, n * size)
    here = torch.arange(L, device=place.device).expand(B, L)
    source = place.new_full((B, n * size + 1), L).scatter(1, slot, here)[:, :-1]
    there = (source < L).unflatten(1, (n, size))
    fresh = None
    if resets is not None:
        started = torch.zeros(B, n + 1, dtype=torch.bool, device=place.device)
        marks = torch.where(resets & valid, frame, n)
        fresh = started.scatter(1, marks, torch.ones_like(resets))[:, :n]
    order = torch.arange(size, device=place.device).expand(1, n, size)
    return Frames(n, size, order, there, fresh, there[..., -1], source, slot)

"""Keys and values that the past left behind, kept at the right edge.

A cache is ``k, v (B, G, S, D)``. Of a row whose document has ``n`` tokens so far, the last ``min(n, S)`` slots hold its newest keys, oldest first, and the slots
before them are zero. So rows of different lengths stand side by side, appending a full piece is one concatenation, and the one number ``n`` says both which slots
count and which position comes next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout


def ragged(layout: Layout | None) -> bool:
    """Whether a layout makes rows differ in what they see: it has lengths or resets."""
    return layout is not None and (layout.lengths is not None or layout.resets is not None)


def positions_in(layout: Layout | None, length: int, before: Tensor | int, device: torch.device) -> Tensor:
    """Position of every token in its document: int64 ``(L,)``, or ``(B, L)`` where rows differ.

    Args:
        layout: of the piece.
        length: positions L of the piece.
        before: tokens that each row's document had before, ``(B,)``, or one number for all.
        device: where to make them.
    """
    here = torch.arange(length, device=device)
    starts = None if layout is None else layout.starts()
    going_on = here + (before[:, None] if isinstance(before, Tensor) else before)
    return going_on if starts is None else torch.where(starts >= 0, here - starts, going_on)


def counts_after(layout: Layout | None, length: int, before: Tensor) -> Tensor:
    """int64 ``(B,)``: tokens of each row's last document at the row's own length; arguments as :func:`positions_in`."""
    lengths = None if layout is None else layout.lengths
    added = torch.full_like(before, length) if lengths is None else lengths
    if layout is None or layout.resets is None:
        return before + added
    valid = layout.valid(length)
    # A document that would begin in the padding has not begun.
    resets = layout.resets if valid is None else layout.resets & valid
    latest = torch.where(resets, torch.arange(length, device=before.device), -1).amax(1)
    return torch.where(latest >= 0, added - latest, before + added)


def keep(kv: Tensor, slots: int, layout: Layout | None, length: int, counts: Tensor | None) -> Tensor:
    """The newest keys of each row, at the right edge of a cache of ``slots``.

    Args:
        kv: ``(B, G, S, D)``, the cache so far and then the ``length`` keys of the piece.
        slots: how many to keep.
        layout: of the piece.
        length: positions L of the piece.
        counts: int64 ``(B,)``, tokens of each row's document now; slots before them are zeroed. ``None``: all of ``kv`` counts.

    Returns:
        ``(B, G, slots, D)`` in memory of its own, unless it is all of ``kv``.
    """
    S = kv.shape[2]
    if counts is None and slots == S:
        return kv
    lengths = None if layout is None else layout.lengths
    if lengths is None:
        kept = F.pad(kv, (0, 0, slots - S, 0)) if slots > S else kv[:, :, S - slots :]
    else:
        slot = torch.arange(S - slots, S, device=kv.device) - (length - lengths)[:, None]
        index = slot.clamp_min(0)[:, None, :, None].expand(-1, kv.shape[1], -1, kv.shape[3])
        kept = kv.gather(2, index)
    if counts is None:
        return kept.clone() if slots < S else kept
    old = torch.arange(slots, device=kv.device) < slots - counts[:, None]
    return kept.masked_fill(old[:, None, :, None], 0)

"""The tail of a piece: the last inputs of a document, which is what a convolution or a shift over time must remember.

Definition: of a row, the ``N`` inputs before its own length, oldest first, where those of the past (the tail that came in) stand before the piece, and zeros
stand in the place of all that belongs to an earlier document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout


def tail_after(x: Tensor, tail: Tensor, layout: Layout | None) -> Tensor:
    """The last ``N`` inputs of each row's last document at its own length, oldest first, zeros before them.

    Args:
        x: a piece ``(B, L, D)``.
        tail: the last ``N`` inputs before it ``(B, N, D)``.
        layout: of the piece.

    Returns:
        like ``tail``, in memory of its own.
    """
    (B, L, _), N = x.shape, tail.shape[1]
    if N == 0:
        return tail.clone()
    if layout is None or (layout.lengths is None and layout.resets is None):
        if torch.compiler.is_compiling():
            return torch.cat([tail, x.to(tail.dtype)], 1)[:, L:]
        kept = x[:, max(0, L - N) :].to(tail.dtype)
        return torch.cat([tail[:, L:], kept], 1) if L < N else kept.clone()
    ends = torch.full((B,), L, device=x.device) if layout.lengths is None else layout.lengths
    place = ends[:, None] + torch.arange(-N, 0, device=x.device)  # in the piece, or before it
    rows = torch.arange(B, device=x.device)[:, None]
    # By indices, since `gather` keeps all of what it takes from for its backward.
    old, new = tail[rows, (place + N).clamp(0, N - 1)], x[rows, place.clamp(0, L - 1)].to(tail.dtype)
    kept = torch.where((place < 0)[..., None], old, new)
    starts = layout.starts()
    if starts is None:
        return kept
    start = starts.gather(1, (ends - 1).clamp_min(0)[:, None])
    # -1: the past's own document goes on, all of whose tail counts.
    start = torch.where((ends[:, None] > 0) & (start >= 0), start, -N)
    return torch.where((place >= start)[..., None], kept, 0)

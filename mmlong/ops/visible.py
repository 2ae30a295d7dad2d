"""Which keys a query sees: an interval, and nothing else.

Causality, a past before the piece, sliding windows, padding and documents in one row all say the same kind of thing: query ``i`` of row ``b`` sees the keys
``first <= j < stop``. So every softmax attention of the house is described by one small record, and every backend translates that.

The last of the ``S`` keys belongs to the last of the ``L`` queries: query ``i`` owns key ``S - L + i``, and the keys before those are the past. This is the
bottom-right alignment; ``is_causal`` of ``scaled_dot_product_attention`` is top-left and right only where ``S = L``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlong.layout import Layout


@dataclass(frozen=True, eq=False)
class Visible:
    """The interval of keys that each query sees.

    Attributes:
        left: how many keys before its own; ``None`` for all.
        right: how many after its own; 0 is causal, ``None`` for all.
        first: int64 ``(B or 1, L)``, the first key that may be seen, where rows or documents differ.
        stop: int64 ``(B or 1, L)``, the key before which it ends, likewise.
    """

    left: int | None = None
    right: int | None = None
    first: Tensor | None = None
    stop: Tensor | None = None

    def __post_init__(self) -> None:
        for name, n in (("left", self.left), ("right", self.right)):
            if n is not None and n < 0:
                raise ValueError(f"a query sees {name} >= 0 keys beside its own, got {n}")

    @property
    def ragged(self) -> bool:
        """Whether rows or documents differ, so that the intervals are known only as tensors."""
        return self.first is not None or self.stop is not None

    def kind(self, L: int, S: int) -> str:
        """What a backend must be able to mask.

        ``full``; ``causal`` (no past), ``past`` (causal, with one); ``window``; and, where rows or documents differ, ``ragged``, ``ragged past`` and
        ``ragged window`` (with a past or without).
        """
        if torch.compiler.is_exporting() and not isinstance(S, int):
            # Of unknown lengths, a window is one.
            left, right = self.left, self.right
        else:
            left = None if self.left is None or self.left >= S - 1 else self.left
            right = None if self.right is None or self.right >= L - 1 else self.right
        if left is not None or right not in (None, 0):
            return "ragged window" if self.ragged else "window"
        if self.ragged:
            return "ragged" if L == S else "ragged past"
        if right is None:
            return "full"
        return "causal" if L == S else "past"

    def intervals(self, L: int, S: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """``(first, stop)``, int64 ``(B or 1, L)``, of ``L`` queries over ``S`` keys."""
        own = torch.arange(S - L, S, device=device)[None]
        first = torch.zeros_like(own) if self.left is None else (own - self.left).clamp_min(0)
        stop = torch.full_like(own, S) if self.right is None else (own + self.right + 1).clamp_max(S)
        if self.first is not None:
            first = torch.maximum(first, self.first)
        if self.stop is not None:
            stop = torch.minimum(stop, self.stop)
        first, stop = torch.broadcast_tensors(first, stop)
        return first, stop

    def mask(self, L: int, S: int, device: torch.device | str | None = None) -> Tensor:
        """Bool ``(B or 1, 1, L, S)``, true where seen. For short sequences and for compilers: it is quadratic."""
        first, stop = self.intervals(L, S, device)
        key = torch.arange(S, device=device)
        return ((key >= first[..., None]) & (key < stop[..., None]))[:, None]


def visible_in(
    layout: Layout | None,
    length: int,
    *,
    causal: bool,
    window: int | None = None,
    past: int = 0,
    counts: Tensor | None = None,
) -> Visible:
    """What the queries of a piece see of its keys and of the past before them.

    Args:
        layout: of the piece; lengths and resets are honoured. A query at padding sees at least its own key.
        length: positions L of the piece.
        causal: see no later key.
        window: see at most this many keys to each side (``None``: all).
        past: keys of the past, before those of the piece.
        counts: int64 ``(B,)``, how many of those, at their end, each row's document really has; ``None``: all of them.

    Returns:
        intervals over ``past + length`` keys.
    """
    left, right = window, 0 if causal else window
    resets = None if layout is None else layout.resets
    lengths = None if layout is None else layout.lengths
    first = stop = None
    if counts is not None:
        first = (past - counts)[:, None].expand(-1, length)
    if resets is not None and layout is not None:
        starts = layout.starts()
        assert starts is not None
        before = 0 if first is None else first
        first = torch.where(starts >= 0, starts + past, before)
    if not causal and (resets is not None or lengths is not None):
        stop = past + _ends(resets, lengths, length)
    if not causal and lengths is not None:
        own = past + torch.arange(length, device=lengths.device)[None]
        there = own < past + lengths[:, None]
        first = torch.where(there, 0 if first is None else first, own)
        stop = torch.where(there, own + 1 if stop is None else stop, own + 1)
    return Visible(left, right, first, stop)


def _ends(resets: Tensor | None, lengths: Tensor | None, L: int) -> Tensor:
    """int64 ``(B, L)``: where the document of each position ends, exclusive."""
    if resets is None:
        assert lengths is not None
        return lengths[:, None].expand(-1, L)
    here = torch.arange(L, device=resets.device)
    begins = torch.where(resets, here, L)
    later = torch.cat([begins[:, 1:], torch.full_like(begins[:, :1], L)], dim=1)
    ends = later.flip(1).cummin(1).values.flip(1)
    return ends if lengths is None else torch.minimum(ends, lengths[:, None])

"""What attention over a selection of the past shares: the keys and values so far, and how much is scored at a time.

What is selected is the subclasses'. Anything of the past may be selected later, so the state grows: the turned keys and the values ``k, v (B, kv_heads, S, head_dim)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention

GATE_ELEMENTS = 1 << 20
"""Scores, by which something is selected, that are looked at together."""


class SelectingAttention(DocumentAttention):
    """Base of attention over a selection of the past; options as :class:`~mmlong.mixers.document_attention.DocumentAttention`."""

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": seen, "v": seen}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(length) if self.streaming else 0

    def project_all(self, x: Tensor, state: Parts | None, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(N, heads, T, head_dim)`` of a piece, and keys and values ``(N, kv_heads, past + T, head_dim)`` so far."""
        q, k, v = self.project(x, past)
        k, v = so_far(state, {"k": k, "v": v})
        return q, k, v


def so_far(state: Parts | None, new: Parts) -> list[Tensor]:
    """What a state has of each name and then what is new, along axis -2."""
    if state is None:
        return list(new.values())
    return [torch.cat([state[name].to(t.dtype), t], -2) for name, t in new.items()]


def stretches(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Stretches ``i:j`` of queries of which each has ``width`` scores."""
    step = max(1, GATE_ELEMENTS // max(1, width))
    for i in range(0, length, step):
        yield i, min(i + step, length)

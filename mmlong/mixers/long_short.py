"""Long-short attention: a window, and the whole sequence projected to a few keys by weights that the tokens give.

Follows Zhu et al. 2021 (Transformer-LS, arXiv 2107.02192) as in the authors' code:

    P = softmax over tokens (W_P x)              r columns a head; two-sided over the whole sequence, causal over each segment of s tokens
    long keys    K' = LN_G(P^T K),  V' = LN_G(P^T V)
    short keys   K~ = LN_L(K),      V~ = LN_L(V)             one norm for keys and values, over all heads (the paper's DualLN)
    y = softmax(q [K~ ; K']^T / sqrt(d)) [V~ ; V']           one softmax over both

What is short, and what is long, for a token at ``t``::

    causal      the window's last ``window`` tokens, its own with them; the r keys of every segment before its own
    two-sided   the segment of ``window`` tokens that it is in and half a window to each side; the r keys of the whole sequence

A token of the window is in the long keys too; that is the paper's. Rotary positions (``rope``) are for the window only, in place of the relative positions of the authors' causal model; long keys have none.
(``W_P`` has no bias: over tokens it would cancel. The authors' two-sided code projects keys that have been through ``LN_L``; their causal code, and both forms here, those that have not.)

Causal it streams: the window, the long keys of the segments that are over, and keys, values and scores of the segment that runs. Its work grows with the square of the length over ``s / r``; two-sided it is linear.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.interval_attention import interval_part
from mmlong.ops.rotary import rotary_table, rotate

TWO_SIDED_RANK = 32


@register_mixer(
    "long_short",
    paper="Zhu et al. 2021, arXiv 2107.02192",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note=(
        "windows and segments as in the authors' code (a causal token sees the segments before its own), RoPE in the window in place of Transformer-XL's positions; two-sided the work is linear; proved against the "
        "definition, and against long-short-transformer (shared keys and values, one head, one window), weights copied"
    ),
)
class LongShort(DocumentAttention):
    """Long-short attention; other options as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Args:
        window: keys of the window; two-sided the width of a segment, to which half as many on each side come.
        segment: causal: tokens that are projected together.
        rank: long keys r, causal of each segment, two-sided of the sequence; ``None`` for 1 and 32.
        norm_eps: of both norms.

    Raises:
        ValueError: sizes below 1, or a causal rank that is not below the segment.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        window: int = 128,
        segment: int = 16,
        rank: int | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        self.rank = (1 if causal else TWO_SIDED_RANK) if rank is None else rank
        for option, n in (("window", window), ("segment", segment), ("rank", self.rank)):
            if n < 1:
                raise ValueError(f"LongShort: {option} must be at least 1, got {n}")
        if causal and self.rank >= segment:
            raise ValueError(
                f"LongShort: rank {self.rank} must be below segment {segment}, or nothing is projected away"
            )
        self.window, self.segment = window, segment
        inner = self.heads * self.head_dim
        self.score_proj = nn.Linear(dim, self.heads * self.rank, bias=False)
        self.local_norm = nn.LayerNorm(inner, eps=norm_eps)
        self.global_norm = nn.LayerNorm(inner, eps=norm_eps)

    def slots(self, seen: int) -> dict[str, int]:
        window, long, part = min(seen, self.window - 1), self.rank * (seen // self.segment), seen % self.segment
        names = {"k": window, "v": window, "long_k": long, "long_v": long}
        return {**names, "part_k": part, "part_v": part, "part_scores": part}

    def state_bytes(self, length: int) -> int:
        if not self.streaming:
            return 0
        slots = self.slots(length)
        tokens = sum(n for name, n in slots.items() if name != "part_scores")
        return 4 * self.heads * (self.head_dim * tokens + self.rank * slots["part_scores"])

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v, scores = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj, self.score_proj))
        q, short_k = (t.unflatten(2, (self.heads, -1)) for t in (q, self.local_norm(k)))
        short_v = self._heads(self.local_norm(v))
        turned = q
        if self.rope:
            table = rotary_table(torch.arange(past, past + x.shape[1], device=x.device), self.head_dim, self.rope_base, x.dtype)  # fmt: skip
            turned, short_k = rotate(q, table), rotate(short_k, table)
        q, turned, short_k = (t.transpose(1, 2) for t in (q, turned, short_k))
        if not self.causal:
            long_k, long_v = (self._long(t[:, None], scores[:, None]) for t in (k, v))
            return self._read(q, turned, (short_k, short_v), (long_k, long_v), self._both_sides(x.shape[1])), None
        if state is not None:
            short_k, short_v = (torch.cat([state[n], t], 2) for n, t in (("k", short_k), ("v", short_v)))
            k, v = (torch.cat([state[n], t], 1) for n, t in (("part_k", k), ("part_v", v)))
            scores = torch.cat([state["part_scores"], scores], 1)
        full = k.shape[1] // self.segment
        over = full * self.segment
        segments = [t[:, :over].unflatten(1, (full, self.segment)) for t in (k, v, scores)]
        long_k, long_v = (self._long(t, segments[2]) for t in segments[:2])
        if state is not None:
            long_k, long_v = (torch.cat([state[n], t], 2) for n, t in (("long_k", long_k), ("long_v", long_v)))
        seen = self._before(past, x.shape[1], short_k.shape[2])
        y = self._read(q, turned, (short_k, short_v), (long_k, long_v), seen)
        first = short_k.shape[2] - min(past + x.shape[1], self.window - 1)
        after = {"k": short_k[:, :, first:], "v": short_v[:, :, first:], "long_k": long_k, "long_v": long_v}
        part = {"part_k": k[:, over:], "part_v": v[:, over:], "part_scores": scores[:, over:]}
        return y, {name: t.clone() for name, t in {**after, **part}.items()}

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _long(self, t: Tensor, scores: Tensor) -> Tensor:
        """Long keys or values ``(N, H, m r, d)`` of ``m`` stretches of tokens ``(N, m, s, H d)``."""
        weights = scores.unflatten(3, (self.heads, -1)).transpose(2, 3).softmax(3)  # (N, m, H, s, r)
        found = weights.transpose(3, 4) @ t.unflatten(3, (self.heads, -1)).transpose(2, 3)
        return self._heads(self.global_norm(found.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)))

    def _both_sides(self, length: int) -> tuple[np.ndarray, ...]:
        """Of every query where its short and its long keys begin and end: ``(first, stop, long stop)``, each ``(1, T)``."""
        begins = np.arange(length)[None] // self.window * self.window
        half = self.window // 2
        first, stop = np.maximum(begins - half, 0), np.minimum(begins + self.window + half, length)
        return first, stop, np.full_like(first, self.rank)

    def _before(self, past: int, length: int, keys: int) -> tuple[np.ndarray, ...]:
        """The same of a causal piece, whose short keys are the last of ``keys``."""
        own = np.arange(keys - length, keys)[None]
        segments = np.arange(past, past + length)[None] // self.segment
        return np.maximum(own - self.window + 1, 0), own + 1, segments * self.rank

    def _read(
        self,
        q: Tensor,
        turned: Tensor,
        short: tuple[Tensor, Tensor],
        long: tuple[Tensor, Tensor],
        seen: tuple[np.ndarray, ...],
    ) -> Tensor:
        first, stop, long_stop = seen
        scale = 1 / math.sqrt(self.head_dim)
        parts = [interval_part(turned, *short, first, stop, scale)]
        if int(long_stop.max()):
            parts.append(interval_part(q, *long, np.zeros_like(long_stop), long_stop, scale))
        return self.leave(merge_parts(parts)[0])

"""Attention over a pattern of positions: a mixer in a few lines, streaming included.

A subclass says who sees whom (:mod:`mmlong.ops.block_patterns`), of all heads or of some, and the rest follows: which blocks are computed, which keys and values are kept for later queries, and so the state, its size and its bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.block_patterns import Either, Pattern, kept, places_of
from mmlong.ops.pattern_attention import PATTERN_ATTENTION, pattern_attention


class PatternAttention(DocumentAttention):
    """Base of attention over patterns.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        patterns: who sees whom: one of all heads, or several, each of as many heads as the others (the last has the rest). A causal mixer's see no later key.
        sizes: tokens of a block of queries, and of keys, in which it is computed.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.
        backend: of :mod:`mmlong.ops.pattern_attention`.

    Raises:
        ValueError: sizes that do not divide, or more patterns than heads.
        BackendError: a backend that is not known.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        patterns: Sequence[Pattern],
        sizes: tuple[int, int] = (128, 64),
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        if backend != "auto":
            PATTERN_ATTENTION[backend]  # an unknown name is refused now, not at the first batch
        if len(patterns) > self.heads:
            raise ValueError(
                f"{self.name or type(self).__name__}: {len(patterns)} patterns need as many heads, got {self.heads}: set heads"
            )
        self.patterns, self.sizes, self.backend = tuple(patterns), sizes, backend
        self.keeping = functools.reduce(Either, self.patterns)

    def slots(self, seen: int) -> dict[str, int]:
        n = len(kept(self.keeping, seen))
        return {"k": n, "v": n}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(self.slots(length)["k"]) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project(x, past)
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        each = self.heads // len(self.patterns)
        found = []
        for n, pattern in enumerate(self.patterns):
            some = slice(n * each, self.heads if n == len(self.patterns) - 1 else (n + 1) * each)
            asking, shown, told = (t[:, some] for t in (q, k, v)) if len(self.patterns) > 1 else (q, k, v)
            sizes = {"q_size": self.sizes[0], "k_size": self.sizes[1]}
            found.append(
                pattern_attention(
                    asking, shown, told, pattern, past, keeping=self.keeping, backend=self.backend, **sizes
                )
            )
        y = self.leave(found[0] if len(found) == 1 else torch.cat(found, 1))
        return y, self._after(k, v, past, x.shape[1]) if self.causal else None

    def _after(self, k: Tensor, v: Tensor, past: int, T: int) -> Parts:
        """Of the keys and values that there are, those that a later query may see."""
        index = np.searchsorted(places_of(T, past, self.keeping), kept(self.keeping, past + T))
        if len(index) and index[-1] - index[0] + 1 == len(index):
            a, b = int(index[0]), int(index[-1]) + 1
            return {"k": k[:, :, a:b].clone(), "v": v[:, :, a:b].clone()}
        chosen = torch.from_numpy(index).to(k.device)
        return {"k": k.index_select(2, chosen), "v": v.index_select(2, chosen)}

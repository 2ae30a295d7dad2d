"""LongNet's dilated attention: segments of growing length, of which each sees a growing share.

Follows Ding et al. 2023 (arXiv 2307.02486). For segments ``w_1 < w_2 < ...`` and rates ``r_1 = 1 <= r_2 <= ...``, in geometric progression: of every segment of ``w_k`` positions, counted from 0, head ``h`` takes the tokens at ``h mod r_k``, ``h mod r_k + r_k``,
..., and these see one another, causally or not. With ``y_k`` and the sum ``s_k`` of exponentials that a token has of its ``k``-th segment, none where it was not taken,

    y = sum_k s_k y_k / sum_k s_k

so a key that is in two segments counts twice. Of segments 4 and 8 and rates 1 and 2, causal, heads 0 and 1 (``2``: twice)::

    2 . . . . . . .     # . . . . . . .
    # # . . . . . .     # 2 . . . . . .
    2 # 2 . . . . .     # # # . . . . .
    # # # # . . . .     # 2 # 2 . . . .
    # . # . 2 . . .     . . . . # . . .
    . . . . # # . .     . # . # # 2 . .
    # . # . 2 # 2 .     . . . . # # # .
    . . . . # # # #     . # . # # 2 # 2

Every token is taken at rate 1, so none is without a key. Work is linear in the length: a token has at most ``w_k / r_k`` keys of each of its segments. Beyond the longest segment nothing is seen.

The causal state is the keys and values of the longest segment that is open, so its size goes up and down and has a bound. Departures: the sums ``s_k`` have gradients, as a softmax has; the authors' code takes them for constants. Positions are rotary, as xPos in theirs
(``rope=False``: none).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.dilated_attention import dilated_part
from mmlong.ops.tiled_attention import HIDDEN


@register_mixer(
    "dilated",
    paper="Ding et al. 2023, arXiv 2307.02486",
    bidirectional=True,
    state="constant",
    cost="n",
    note="LongNet, with RoPE (rope=False: none) and gradients through the denominators that mix the segments; proved against dense softmaxes in float64 under explicit masks, one for each segment length",
)
class Dilated(DocumentAttention):
    """Dilated segments, mixed by their softmaxes' denominators.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        segments: lengths ``w_k`` of segments, each a multiple of the one before.
        rates: dilations ``r_k``, the first 1, each dividing its segment.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        segments: Sequence[int] = (512, 1024, 2048, 4096, 8192),
        rates: Sequence[int] = (1, 2, 4, 8, 16),
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        self.segments, self.rates = list(segments), list(rates)
        if not self.segments or len(self.segments) != len(self.rates):
            raise ValueError(f"Dilated: segments and rates must be as many, got {self.segments} and {self.rates}")
        if min(self.segments) < 1 or any(b % a for a, b in zip(self.segments, self.segments[1:], strict=False)):
            raise ValueError(f"Dilated: each of segments must be a multiple of the one before, got {self.segments}")
        if self.rates[0] != 1:
            raise ValueError(f"Dilated: the first of rates must be 1, so that every token has keys, got {self.rates}")
        if min(self.rates) < 1 or any(w % r for w, r in zip(self.segments, self.rates, strict=True)):
            raise ValueError(f"Dilated: rates {self.rates} must divide the segments {self.segments}")

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": seen % self.segments[-1], "v": seen % self.segments[-1]}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(length % self.segments[-1]) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project(x, past)
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        y = self._mixed(q, k, v)
        if not self.causal:
            return self.leave(y), None
        open_at = k.shape[2] // self.segments[-1] * self.segments[-1]
        return self.leave(y), {"k": k[:, :, open_at:].clone(), "v": v[:, :, open_at:].clone()}

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N, H, T, D = q.shape
        parts = [dilated_part(q, k, v, w, r, self.causal) for w, r in zip(self.segments, self.rates, strict=True)]
        logs = []
        for _, log_sums, rows in parts:
            if rows is not None:
                index = torch.from_numpy(rows).to(q.device)
                none = log_sums.new_full((N * T * H,), HIDDEN)
                log_sums = none.index_copy(0, index, log_sums).view(N, T, H).transpose(1, 2)
            logs.append(log_sums)
        # Not by the logarithm of the whole sum: where scores are large that is rounded by more than its parts differ.
        shares = torch.stack(logs).softmax(0)
        y: Tensor | None = None
        for (part, _, rows), share in zip(parts, shares.transpose(2, 3), strict=True):
            if rows is None:
                part = part.transpose(1, 2) * share[..., None]
                y = part if y is None else y + part
            else:
                assert y is not None
                index = torch.from_numpy(rows).to(q.device)
                part = part * share.flatten().index_select(0, index)[:, None]
                y = y.reshape(-1, D).index_add(0, index, part).view(N, T, H, D)
        assert y is not None
        return y.transpose(1, 2)

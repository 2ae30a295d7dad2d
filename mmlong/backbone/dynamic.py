"""Dynamic chunking: where a chunk begins is learned, and parts run on one token of each.

Follows H-Net (Hwang, Wang & Gu 2025, arXiv 2507.07955). With ``x`` the tokens, and everything about time running from the document's first token:

    p_t = (1 - cos(W_q x_t, W_k x_{t-1})) / 2,   p_0 = 1;        a chunk begins at t where p_t >= 1/2
    c_g = inner(x_{t(g)}),   t(g) the token that begins chunk g
    s_g = p_{t(g)} c_g + (1 - p_{t(g)}) s_{g-1}                  what a hardly certain chunk has is smoothed with the one before
    y_t = W x_t + ste(q_t) s_{g(t)},   q_t = p_t where a chunk begins and 1 - p_t elsewhere

``ste(q)`` is 1 in value and has the gradient of ``q``: the more certain the decisions, the better. ``W_q`` and ``W_k`` begin as unit matrices, so a chunk begins where a token is unlike the one before. A loss of its own (:mod:`mmlong.mixers.own_loss`) brings the share ``F`` of tokens that begin a chunk, and the mean ``G``
of ``p``, towards ``1 / n``:

    n / (n - 1) ((n - 1) F G + (1 - F) (1 - G)),       at least 1, times ``weight``

The inner parts may be wider: tokens are lengthened by a learned vector, and the result is cut off (the paper's way). In segments and over ranks the loss is that of each call.

Departures: none but names; what surrounds a level (an encoder and decoder of Mamba-2, in the paper) are the parts beside it. The state is what the inner parts left behind, the last token, and what the open chunk has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.hierarchy import Place
from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.ops.chunks import begun_at
from mmlong.ops.scan import scan
from mmlong.ops.tails import tail_after


@register_part("dynamic")
class DynamicLevel(Part):
    """Parts that run on learned chunks.

    Args:
        inner: the parts; causal, and streaming if the level is to.
        ratio: n, tokens of a chunk that are aimed at.
        dim, inner_dim: width outside and inside, the latter at least the former.
        weight: of the loss.

    Raises:
        ValueError: sizes that make no sense, or parts that see both sides.
    """

    def __init__(self, inner: nn.Module, ratio: float, dim: int, inner_dim: int, weight: float = 0.03) -> None:
        super().__init__(inner)
        if not ratio > 1 or not weight >= 0 or inner_dim < dim:
            raise ValueError(
                f"dynamic chunks are aimed at more than 1 token, by a weight of at least 0, with parts at least as wide; got {ratio}, {weight} and {inner_dim} in {dim}"
            )
        if not inner.causal:
            raise ValueError("dynamic chunking is of causal parts; these see both sides")
        self.ratio, self.weight = float(ratio), weight
        self.q_proj, self.k_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        for proj in (self.q_proj, self.k_proj):
            nn.init.eye_(proj.weight)
        self.residual = nn.Linear(dim, dim)
        self.wider = nn.Parameter(torch.zeros(inner_dim - dim))

    counted_as = "learned chunks are counted at the length aimed at, the same in every row"

    @property
    def has_own_loss(self) -> bool:
        """Whether the share of chunks is aimed at."""
        return self.weight > 0

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        B, L, D = x.shape
        wide = D + self.wider.shape[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            tail, open_chunk, before = x.new_zeros(B, 1, D), x.new_zeros(B, wide, dtype=dtype), None
        else:
            tail, open_chunk, before = state["tail"], state["chunk"], state["inner"]
        place = Place.of(state, B)
        first = self._first(place, x, layout)
        p = self.chances(x, tail, first)
        starts = p >= 0.5
        chunks = begun_at(starts, layout, 1 / self.ratio)
        self._own_loss(p, starts, layout)
        inner = before
        if chunks.count:
            taken = chunks.take(x)
            taken = torch.cat([taken, self.wider.to(x.dtype).expand(B, chunks.count, -1)], -1)
            c, inner = self.inner(taken, before, chunks.layout)
            sure = chunks.take(p[..., None])
            with torch.autocast(x.device.type, enabled=False):
                s, _ = scan((1 - sure).expand(-1, -1, wide), sure * c.to(dtype), open_chunk, chunks.layout)
            found, open_chunk = chunks.give(s, open_chunk)[..., :D], chunks.last(s, open_chunk)
        else:
            # As most tokens that are drawn: all are of the chunk that was open.
            found = open_chunk[:, None, :D].expand(-1, L, -1)
        if p.requires_grad:
            certain = torch.where(starts, p, 1 - p)
            # 1, with the gradient of how certain it was.
            found = found * (certain + (1 - certain).detach())[..., None]
        y = self.residual(x) + found.to(x.dtype)
        if not self.streaming:
            return y, None
        after = {"tail": tail_after(x, tail, layout), "inner": inner, "chunk": open_chunk}
        return y, {**after, **place.after(x, layout, 1)}

    @staticmethod
    def _first(place: Place, x: Tensor, layout: Layout | None) -> Tensor | None:
        """Where a document begins, bool ``(B, L)``; ``None``: nowhere, as most pieces of generation."""
        if place.same and (layout is None or layout.resets is None):
            return None
        return document_index(place.each(x.device), x.shape[1], layout) == 0

    def chances(self, x: Tensor, tail: Tensor, first: Tensor | None) -> Tensor:
        """``p (B, L)`` in at least float32, 1 where a document begins."""
        previous = tail.to(x.dtype) if x.shape[1] == 1 else torch.cat([tail.to(x.dtype), x[:, :-1]], 1)
        q, k = self.q_proj(x), self.k_proj(previous)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            alike = F.cosine_similarity(q.to(dtype), k.to(dtype), dim=-1)
            p = ((1 - alike) / 2).clamp(0, 1)
            return p if first is None else torch.where(first, 1.0, p)

    def _own_loss(self, p: Tensor, starts: Tensor, layout: Layout | None) -> None:
        if not (self.has_own_loss and self.training and own_loss_asked()):
            return
        valid = None if layout is None else layout.valid(p.shape[1])
        p, begun = (p.flatten(), starts.flatten()) if valid is None else (p[valid], starts[valid])
        tokens, n = p.shape[0], self.ratio
        if tokens:
            share, mean = begun.to(p.dtype).mean(), p.mean()
            loss = n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))
            add_own_loss(self, self.weight * loss * tokens, tokens)

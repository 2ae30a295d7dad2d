"""Chunks that the text has: parts that run where a word ends, and nowhere else.

Follows SpaceByte (Slagle 2024, arXiv 2404.14408). A byte is *spacelike* if it is no letter, no digit and no continuation byte of UTF-8: spaces, punctuation, control characters, and the bytes that begin a character of several. With ``s_t`` whether byte ``t`` is:

    a chunk begins at t   where s_t and not s_{t-1}, and at the document's first token
    c = inner((0, x_{t(0)}), (0, x_{t(1)}), ...),       t(g) the token that begins chunk g
    y_t = x_t + cut(c_g)  at t = t(g);       y_t = x_t  elsewhere

So the wide inner parts run on the space after a word, which is where the next word is to be predicted, and what they found reaches the other tokens through the parts behind, over their own reach. ``(0, x)`` fills ``x`` up to the width inside with zeros before it, and ``cut`` takes as many channels from the end.

The rule is of bytes, and a part sees vectors: the model gives it ``layout.codes``, the byte that each position was made of (an autoregressive model, whose position ``t`` is made of byte ``t - 1``, gives that one, and -1 for its start vector, which is spacelike as is the paper's BOS). The rule so is causal in what the
tokens are made of, wherever they come from. Only backbones that read them are given any.

Departures: no most chunks of a row (the paper's code drops the loss behind the last that has room); positions are the inner mixers' own. The state is what the inner parts left behind, and whether the last byte was spacelike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.hierarchy import Place
from mmlong.backbone.part import Part, codes_of, register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State
from mmlong.ops.chunks import begun_at
from mmlong.ops.tails import tail_after


def spacelike(codes: Tensor) -> Tensor:
    """Bool, like ``codes``: bytes that are no letter, no digit and no continuation byte; -1, before a document, is."""
    letter = ((codes >= 65) & (codes <= 90)) | ((codes >= 97) & (codes <= 122))
    digit = (codes >= 48) & (codes <= 57)
    continuation = (codes >= 128) & (codes < 192)
    return ~(letter | digit | continuation)


@register_part("spacebyte")
class SpaceByte(Part):
    """Parts that run on the tokens after which a word may begin.

    Args:
        inner: the parts; causal.
        rule: ``utf8``, the paper's; or a list of the codes that are spacelike, for other modalities of codes.
        dim, inner_dim: width outside and inside, the latter at least the former.

    Raises:
        ValueError: another rule, an inner width that is less, or parts that see both sides.
    """

    def __init__(self, inner: nn.Module, rule: str | Sequence[int], dim: int, inner_dim: int) -> None:
        super().__init__(inner)
        if inner_dim < dim:
            raise ValueError(f"spacebyte needs parts at least as wide as what is outside, got {inner_dim} in {dim}")
        if not inner.causal:
            raise ValueError("spacebyte is of causal parts; these see both sides")
        self.codes = None if isinstance(rule, str) else [int(code) for code in rule]
        if rule != "utf8" and not self.codes:
            raise ValueError(f"spacebyte's rule is utf8, or a list of the codes that are spacelike; got {rule!r}")
        self.wider = inner_dim - dim

    @property
    def reads_codes(self) -> str:
        """The kind of modality whose codes it reads."""
        return "text" if self.codes is None else "any"

    def spacelike(self, codes: Tensor) -> Tensor:
        """Bool, like ``codes``."""
        if self.codes is None:
            return spacelike(codes)
        return torch.isin(codes, torch.tensor([-1, *self.codes], device=codes.device))

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state.

        Raises:
            ValueError: a layout without codes.
        """
        codes, (B, L, D) = codes_of("spacebyte", layout), x.shape
        place = Place.of(state, B)
        like = self.spacelike(codes)
        tail = like.new_zeros(B, 1, 1, dtype=torch.int64) if state is None else state["space"]
        before = torch.cat([tail[..., 0] > 0, like[:, :-1]], 1)
        starts = (like & ~before) | (document_index(place.each(x.device), L, layout) == 0)
        chunks = begun_at(starts, layout)
        inner, y = None if state is None else state["inner"], x
        if chunks.count:
            c, inner = self.inner(F.pad(chunks.take(x), (self.wider, 0)), inner, chunks.layout)
            found = chunks.give(c[..., self.wider :], x.new_zeros(B, D))
            y = x + torch.where(starts[..., None], found, 0)
        if not self.streaming:
            return y, None
        space = tail_after(like[..., None].long(), tail, layout)
        return y, {"inner": inner, "space": space, **place.after(x, layout, 1)}

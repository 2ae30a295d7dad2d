"""Linformer: keys and values projected along the sequence to a few rows, by matrices that are learned for its positions.

Follows Wang et al. 2020 (arXiv 2006.04768), for every head,

    y = softmax(Q (E K)^T / sqrt(d)) (F V),     E, F in R^{k x n}

``n`` is the longest document, ``max_length``; a shorter one uses the first columns of E and F, as if zeros followed it. The paper shares the matrices: between heads (``sharing="head"``), and between keys and
values too (``"key_value"``), or not at all (``"none"``). One pair for all layers is a matter of a model, not of its mixers, and is not offered.

Where heads share a matrix, ``E (X W) = (E X) W``: the sequence is projected before its channels are, and neither keys nor values of all tokens are ever made. Both sides are seen: a row of E mixes all
positions, so there is no causal form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads

SHARING = ("none", "head", "key_value")


@register_mixer(
    "linformer",
    paper="Wang et al. 2020, arXiv 2006.04768",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="proved against the linformer package, weights copied; documents up to max_length; sharing between layers is left to models",
    survey=(("Linformer", ""),),
)
class Linformer(DocumentMixer):
    """Softmax attention over keys and values that a learned matrix has projected along the sequence.

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        rank: rows k of the matrices: keys that every query sees.
        max_length: columns n of the matrices: tokens of the longest document.
        sharing: of the matrices: ``"none"``, ``"head"`` (all heads have the same E and the same F), ``"key_value"`` (and E is F).

    Attributes:
        E, F: ``(k, n)``, or ``(heads, k, n)`` where heads do not share. ``F`` is ``None`` where it is E. At the start normal, of variance ``1 / k``.

    Raises:
        ValueError: sizes that do not divide, none, or an unknown sharing; in a call, a document longer than ``max_length``.
    """

    F: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        rank: int = 256,
        max_length: int = 4096,
        sharing: str = "head",
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("linformer", dim, heads, None, head_dim)
        for option, n in (("rank", rank), ("max_length", max_length)):
            if n < 1:
                raise ValueError(f"linformer: {option} must be at least 1, got {n}")
        if sharing not in SHARING:
            raise ValueError(f"linformer: unknown sharing {sharing!r}; use one of {', '.join(SHARING)}")
        self.rank, self.max_length, self.sharing = rank, max_length, sharing
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        shape = (self.heads, rank, max_length) if sharing == "none" else (rank, max_length)
        self.E = nn.Parameter(torch.randn(shape) * rank**-0.5)
        self.F = None if sharing == "key_value" else nn.Parameter(torch.randn(shape) * rank**-0.5)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T = x.shape[1]
        if self.max_length < T:
            raise ValueError(
                f"linformer: a document of {T:,} tokens, but its matrices have max_length={self.max_length:,} columns: build it with a "
                "larger max_length, or cut the document"
            )
        E = self.E[..., :T]
        F = E if self.F is None else self.F[..., :T]
        if self.sharing == "none":
            k, v = (M @ to_heads(proj(x), self.heads) for M, proj in ((E, self.k_proj), (F, self.v_proj)))
        else:
            rows = E @ x
            k = to_heads(self.k_proj(rows), self.heads)
            v = to_heads(self.v_proj(rows if self.F is None else F @ x), self.heads)
        y = cross_attention(to_heads(self.q_proj(x), self.heads), k, v)
        return self.out_proj(from_heads(y)), None

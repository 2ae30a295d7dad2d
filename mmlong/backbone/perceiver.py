"""Perceivers: a few learned latents read all tokens, parts run on the latents alone, and tokens read those.

With ``N`` latents ``Z_0``, learned, ``R`` reads, and ``CrossRead(q, x)`` queries that read, a residual and a feed-forward (:mod:`mmlong.backbone.cross_read`):

    Z_r = inner(CrossRead_r(Z_{r-1}, x)),  r = 1 .. R

- ``perceiver_io`` follows Jaegle et al. 2021b (arXiv 2107.14795): ``y = CrossRead(x, Z_R)``, the output queries being the tokens themselves, as for the paper's optical flow, so that every token has its own result and the part stands wherever a block does; or, with ``queries``, a learned vector for each place of a document, as for the paper's
  masked language model. One read.
- ``perceiver`` follows Jaegle et al. 2021a (arXiv 2103.03206): what comes out are the latents themselves, so ``N`` tokens for as many as came in; it is the last part of a backbone, and a head pools the latents (the paper: their mean, then a linear layer). The tokens are read again and again; with
  ``share`` all reads after the first have the same weights, as the paper's have, and the inner parts are the same at every read, as the paper's latent transformers are.

The work of the inner parts is independent of the length, and that of reading is linear in it. Both sides are seen, so ``backbone.direction`` is ``both``. Of a row with several documents, each has latents of its own.

Departures: unless ``qk_dim`` and ``v_dim`` say otherwise, widths of heads are the queries' width over their number; in the paper's terms positions are not concatenated here, but are the embedding's affair; the feed-forward of a read is GELU's two layers (2103.03206 has GEGLU in some of its versions). Inner parts that know an order read the latents in theirs: use
``{name: attention, positions: none, bias: true}`` with ``ffn: mlp`` for the paper's latent transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone.cross_read import CrossRead
from mmlong.backbone.part import register_part
from mmlong.backbone.two_sided import TwoSided
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.ops.documents import Documents, documents_of
from mmlong.registry import nearest


class Latents(TwoSided):
    """Base: latents that read tokens, and the parts that run on them.

    Args:
        inner: the parts; see both sides.
        latents: N.
        dim, inner_dim: width of tokens and of latents.
        heads: of the reads; ``None`` for about one per 64 channels.
        ratio: hidden width of a read's feed-forward over its width.
        reads: R.
        share: reads after the first have the same weights.
        qk_dim, v_dim: widths of the reads' keys and values (:class:`CrossRead`).

    Raises:
        ValueError: sizes below 1 or that do not divide, or causal parts.
    """

    def __init__(
        self,
        inner: nn.Module,
        latents: int,
        dim: int,
        inner_dim: int,
        heads: int | None,
        ratio: float,
        reads: int,
        share: bool,
        qk_dim: int | None,
        v_dim: int | None,
    ) -> None:
        super().__init__(inner)
        if latents < 1 or reads < 1:
            raise ValueError(f"{type(self).__name__} needs at least 1 latent and 1 read, got {latents} and {reads}")
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(latents, inner_dim), std=0.02))
        self.reads = reads
        own = min(reads, 2) if share else reads
        self.read = nn.ModuleList(
            CrossRead(inner_dim, dim, heads, ratio, qk_dim=qk_dim, v_dim=v_dim) for _ in range(own)
        )

    def known(self, documents: Documents) -> Tensor:
        """The latents ``(N, latents, inner_dim)`` of every document, after all reads."""
        z = self.latents.to(documents.rows.dtype).expand(documents.rows.shape[0], -1, -1)
        for r in range(self.reads):
            z = self.read[min(r, len(self.read) - 1)](z, documents.rows, documents.valid)
            z, _ = self.inner(z, None, None)
        return z


@register_part("perceiver_io")
class PerceiverIO(Latents):
    """Latents in the middle: tokens are read, and read back.

    Args:
        inner: the parts; see both sides.
        latents: N.
        dim, inner_dim: width of tokens and of latents.
        heads: of the reads; ``None`` for about one per 64 channels.
        ratio: hidden width of a read's feed-forward over its width.
        reads: how often the latents read the tokens.
        share: reads after the first have the same weights.
        qk_dim, v_dim: widths of the reads' keys and values (:class:`CrossRead`).
        residual: tokens are added to what they read.
        queries: documents of up to so many tokens ask by a learned vector for each place; ``None``: by the tokens themselves.
        ask: ``heads``, ``ratio``, ``qk_dim`` and ``v_dim`` of the last read, where they are others than those of the first.

    Raises:
        ValueError: as :class:`Latents`; an option of ``ask`` that there is not. When called: a document longer than ``queries``.
    """

    def __init__(
        self,
        inner: nn.Module,
        latents: int,
        dim: int,
        inner_dim: int,
        heads: int | None = None,
        ratio: float = 1.0,
        reads: int = 1,
        share: bool = True,
        residual: bool = True,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        queries: int | None = None,
        ask: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(inner, latents, dim, inner_dim, heads, ratio, reads, share, qk_dim, v_dim)
        own = {"heads": heads, "ratio": ratio, "qk_dim": qk_dim, "v_dim": v_dim}
        for name in ask or {}:
            if name not in own:
                raise ValueError(f"perceiver_io: ask has no option {name!r}{nearest(name, list(own))}")
        if queries is not None and queries < 1:
            raise ValueError(f"perceiver_io: queries must be at least 1, or None for the tokens, got {queries}")
        self.ask = CrossRead(dim, inner_dim, residual=residual, **{**own, **(ask or {})})
        self.queries = (
            None if queries is None else nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, dim), std=0.02))
        )

    def run(self, documents: Documents) -> Tensor:
        asked = documents.rows
        if self.queries is not None:
            N, T, _ = asked.shape
            if len(self.queries) < T:
                raise ValueError(
                    f"perceiver_io has learned {len(self.queries)} queries, and a document has {T} tokens: make queries more, or leave it out"
                )
            asked = self.queries[:T].to(asked.dtype).expand(N, -1, -1)
        return self.ask(asked, self.known(documents))


@register_part("perceiver")
class Perceiver(Latents):
    """Latents that come out in place of the tokens.

    Args:
        inner: the parts; see both sides.
        latents: N.
        dim, inner_dim: width of tokens and of latents.
        heads: of the reads; ``None`` for about one per 64 channels.
        ratio: hidden width of a read's feed-forward over its width.
        reads: how often the latents read the tokens.
        share: reads after the first have the same weights.
        qk_dim, v_dim: widths of the reads' keys and values (:class:`CrossRead`).

    Raises:
        ValueError: as :class:`Latents`. When called: several documents in a row, of which one row of latents could not tell.

    Attributes:
        tokens_out: N, as :attr:`mmlong.backbone.part.Part.tokens_out` has it.
        width_out: of the latents.
    """

    def __init__(
        self,
        inner: nn.Module,
        latents: int,
        dim: int,
        inner_dim: int,
        heads: int | None = None,
        ratio: float = 1.0,
        reads: int = 3,
        share: bool = True,
        qk_dim: int | None = None,
        v_dim: int | None = None,
    ) -> None:
        super().__init__(inner, latents, dim, inner_dim, heads, ratio, reads, share, qk_dim, v_dim)
        self.tokens_out, self.width_out = latents, inner_dim

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, N, inner_dim)``, no state."""
        if state is not None:
            raise ValueError("Perceiver was given a state but has none: it sees both sides")
        if layout is not None and layout.resets is not None:
            raise ValueError(
                "perceiver gives one row of latents for one document: give it one document a row (layout.resets = None), or use perceiver_io, which gives every token its own"
            )
        return self.known(documents_of(x, layout)), None

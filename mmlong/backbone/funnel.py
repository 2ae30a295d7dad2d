"""Funnel: a stage whose queries are means of ``k`` tokens and whose keys and values are the tokens themselves; parts run on what that gives, and tokens get it back.

Follows Dai et al. 2020 (arXiv 2006.03236), their section 2.2 and 2.3, with ``k = 2`` there:

    h' = mean of every k tokens of x;      h = CrossRead(h', x)           pooled queries, keys and values not pooled
    y_t = x_t + inner(h)_{t // k}                                         up-sampled by repeating, and the residual of the longer stage

Stages nest: ``{funnel: 2, parts: [attention x 4, {funnel: 2, residual: false, parts: [attention x 4]}]}`` shortens twice. With the inner ``residual`` false, tokens get what the last stage has and the residual of the first, which is the paper's decoder; the blocks after the part are its layers. Without what comes after it (a classifier's
use) the inner parts are all the same.

Departures: norms stand before attention and feed-forward, as in the rest of the house, where the paper's stand after; positions are rotary (a pooled query's is that of its first token), where the paper's are Transformer-XL's; no token is kept apart from pooling, as the paper keeps its class token. Both sides are seen, so
``backbone.direction`` is ``both``; groups count from the document's first token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.cross_read import CrossRead
from mmlong.backbone.part import register_part
from mmlong.backbone.two_sided import TwoSided
from mmlong.ops.documents import Documents
from mmlong.ops.group_means import given, group_means


@register_part("funnel")
class Funnel(TwoSided):
    """Parts on pooled queries.

    Args:
        inner: the parts; see both sides.
        k: tokens of a query.
        dim: width D.
        heads: of the read; ``None`` for about one per 64 channels.
        ratio: hidden width of its feed-forward over D.
        residual: tokens are added to what they get back.

    Raises:
        ValueError: ``k`` below 2, heads that do not divide the width, or causal parts.
    """

    def __init__(
        self,
        inner: nn.Module,
        k: int,
        dim: int,
        heads: int | None = None,
        ratio: float = 4.0,
        residual: bool = True,
    ) -> None:
        super().__init__(inner)
        if k < 2:
            raise ValueError(f"a funnel pools at least 2 tokens, got {k}")
        self.k, self.residual = k, residual
        self.read = CrossRead(dim, dim, heads, ratio)

    def run(self, documents: Documents) -> Tensor:
        x, valid, layout = documents.rows, documents.valid, documents.layout
        pooled, here = group_means(x, self.k, valid), torch.arange(x.shape[1], device=x.device)
        h = self.read(pooled, x, valid, (here[:: self.k], here))
        z, _ = self.inner(h, None, None if layout is None else layout.pool(self.k, x.shape[1]))
        y = given(z, self.k, x.shape[1])
        return x + y if self.residual else y

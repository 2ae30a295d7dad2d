"""Charformer's soft blocks (GBST): every position weighs blocks of one to ``M`` tokens that it is in, and parts run on what that gives, shortened.

Follows Tay et al. 2021 (arXiv 2106.12672). After a convolution over ``conv`` neighbours, with ``X_b`` the means of blocks of ``b`` tokens, each given to all positions of its block,

    p_t = softmax over b of w . X_b,t                      b = 1 .. M
    p   = softmax(p p^T) p                                 consensus of all positions, if asked for
    c_g = mean over the d positions of group g of  sum_b p_t,b X_b,t
    y_t = x_t + W inner(c)_{t // d}

so that where a word ends is learned, softly, before the sequence is shortened ``d`` times. The paper has no last line: what follows there is a decoder or a classifier on the shortened sequence; here every token gets its own back, as in the other levels. Blocks and groups count from the document's first token, and only tokens of
the document are in a mean. A block that a position shares with later ones shows it those: both sides are seen, so ``backbone.direction`` is ``both``.

The consensus compares all pairs of positions, in tiles: work that grows with the square of the length; memory does not. Other departures: no offsets of blocks (the paper's appendix), and no position in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.part import register_part
from mmlong.backbone.two_sided import TwoSided
from mmlong.ops.cross_attention import cross_attention
from mmlong.ops.documents import Documents
from mmlong.ops.group_means import given, group_means


@register_part("charformer")
class Charformer(TwoSided):
    """Parts on softly chosen blocks.

    Args:
        inner: the parts; see both sides.
        ratio: d, by how much the sequence is shortened.
        dim, inner_dim: width outside and inside.
        blocks: M, tokens of the largest block.
        consensus: positions agree on what they weigh.
        conv: neighbours of the convolution, odd; 0 for none.
        residual: tokens are added to what they get back.

    Raises:
        ValueError: sizes that make no sense, or causal parts.
    """

    def __init__(
        self,
        inner: nn.Module,
        ratio: int,
        dim: int,
        inner_dim: int,
        blocks: int = 4,
        consensus: bool = False,
        conv: int = 5,
        residual: bool = True,
    ) -> None:
        super().__init__(inner)
        if ratio < 1 or blocks < 1 or conv < 0 or (conv and conv % 2 == 0):
            raise ValueError(
                f"charformer shortens by at least 1, has blocks of at least 1 token, and a convolution over an odd number of them, or 0; got {ratio}, {blocks} and {conv}"
            )
        self.ratio, self.blocks, self.consensus, self.residual = ratio, blocks, consensus, residual
        self.conv = nn.Conv1d(dim, dim, conv, padding=conv // 2) if conv else None
        self.score = nn.Linear(dim, 1)
        self.shorten = nn.Identity() if inner_dim == dim else nn.Linear(dim, inner_dim)
        self.lengthen = nn.Linear(inner_dim, dim)

    def run(self, documents: Documents) -> Tensor:
        x, layout, T = documents.rows, documents.layout, documents.rows.shape[1]
        c = self.shorten(self.mixed(x, documents.valid))
        z, _ = self.inner(c, None, None if layout is None else layout.pool(self.ratio, T))
        y = given(self.lengthen(z), self.ratio, T)
        return x + y if self.residual else y

    def mixed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """What the paper calls GBST: ``(N, T, D)`` to ``c (N, ceil(T / d), D)``."""
        T, h = x.shape[1], x
        if self.conv is not None:
            h = self.conv(h.mT).mT
            h = h if valid is None else torch.where(valid[..., None], h, 0)
        means = [group_means(h, b, valid) for b in range(1, self.blocks + 1)]
        p = self.weights(torch.cat([given(self.score(m), b, T) for b, m in enumerate(means, 1)], -1), valid)
        mixed = torch.zeros_like(h)
        for b, m in enumerate(means, 1):
            mixed = mixed + p[..., b - 1 : b] * given(m, b, T)
        if valid is not None:
            mixed = torch.where(valid[..., None], mixed, 0)
        return group_means(mixed, self.ratio, valid)

    def weights(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """``p (N, T, M)`` of scores, like them."""
        with torch.autocast(scores.device.type, enabled=False):
            p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
            if self.consensus:
                q = p[:, None]
                p = cross_attention(q, q, q, scale=1.0, valid=valid)[:, 0]
        return p.to(scores.dtype)

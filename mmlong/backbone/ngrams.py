"""N-gram embeddings: each token is told the codes that end with it, several at a time, by tables looked up with a hash.

The hash n-gram embeddings of the Byte Latent Transformer (Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1). With ``c_t`` the code that token ``t`` was made of, and for each size ``n`` a table ``E_n`` of vectors:

    y_t = x_t + sum over n of E_n[hash(c_{t-n+1}, ..., c_t) mod rows]
    hash(c_1, ..., c_n) = mix(sum over j of (c_{n-j} + 1) a^j  mod 2^64),    j = 0 .. n - 1

What a mixer would have to learn to put together in its first layers, words and codons, is looked up: much memory and hardly any work (a tenth of a step behind which two blocks of 128 channels stand). Before a document's first token stand codes -1, as before the start vector of an autoregressive model, which is itself -1; nothing crosses a
reset. The state is the last ``max(n) - 1`` codes.

The codes are in ``layout.codes``, which the model gives a backbone that reads them (:mod:`mmlong.backbone.spacebyte`): what an autoregressive model's position ``t`` is made of is the code before it, so nothing of the future is seen.

Departures: the hash is mixed (theirs is the sum mod rows, which leaves most rows of a table empty where n is 2: 676 pairs of letters had 201 of 1,000 rows, by chance 491); tables begin as zeros, so an n-gram that training never met says nothing (theirs begin at random, and are divided by the number of sizes and one more); with ``width`` rows are narrower than the tokens, stand side by side and are projected, which is as many times less to keep and to update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.part import codes_of, register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.ops.tails import tail_after

FACTOR = 1_000_000_007
MIX = -0x4B47D0C5A0B3D2B5
"""Odd: products with them lose nothing."""


@register_part("ngrams")
class NGrams(nn.Module):
    """Embeddings of the last ``n`` codes, added to the tokens.

    Args:
        sizes: the n, e.g. ``[3, 4, 5, 6]``.
        dim: width D.
        rows: of each table. N-grams that share one share its vector.
        width: channels of a row; ``None`` for D, added as they are.
        dropout: of each looked-up vector whole, in training.

    Raises:
        ValueError: sizes below 1 or twice the same, no size, or no row.
    """

    causal = True
    streaming = True
    reads_codes = "any"
    exports = True
    """A program of ``torch.export`` can hold it, unlike other parts that read codes."""
    powers: Tensor
    ends: Tensor
    firsts: Tensor
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"tables": {"weight_decay": 0.0, "lr_scale": 10.0}}
    """A row is met once in many steps: with 1, 4 and 10 times the rate a model of bytes had 1.77, 1.71 and 1.68 bits after 200."""

    def __init__(
        self, sizes: int | Sequence[int], dim: int, rows: int = 65_536, width: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.sizes = (sizes,) if isinstance(sizes, int) else tuple(int(n) for n in sizes)
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"ngrams are of one size or several different ones, each at least 1; got {list(self.sizes)}"
            )
        if rows < 1 or (width is not None and width < 1) or not 0 <= dropout < 1:
            raise ValueError(
                f"ngrams take at least one row of at least one channel, and dropout from 0 to below 1; got rows {rows}, width {width}, dropout {dropout}"
            )
        self.dim, self.rows, self.reach, self.dropout = dim, rows, max(self.sizes) - 1, dropout
        powers = [_signed(pow(FACTOR, j, 2**64)) for j in range(max(self.sizes))]
        self.register_buffer("powers", torch.tensor(powers), persistent=False)
        self.register_buffer("ends", torch.tensor(self.sizes) - 1, persistent=False)
        self.register_buffer("firsts", torch.arange(len(self.sizes)) * rows, persistent=False)
        self.tables = nn.Parameter(torch.zeros(len(self.sizes) * rows, width or dim))
        self.project = None if width is None else nn.Linear(len(self.sizes) * width, dim, bias=False)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state.

        Raises:
            ValueError: another width, or a layout without codes.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"ngrams are added to tokens (B, L, {self.dim}), got {tuple(x.shape)}")
        codes = codes_of("ngrams", layout)[..., None] + 1
        tail = codes.new_zeros(codes.shape[0], self.reach, 1) if state is None else state["codes"]
        found = F.embedding(self._rows_of(torch.cat([tail, codes], 1)[..., 0], layout), self.tables)
        if self.training and self.dropout:
            found = found * F.dropout(found.new_ones(*found.shape[:3], 1), self.dropout)
        y = found.sum(2) if self.project is None else self.project(found.flatten(2))
        return x + y.to(x.dtype), {"codes": tail_after(codes, tail, layout)}

    def _rows_of(self, line: Tensor, layout: Layout | None) -> Tensor:
        """int64 ``(B, L, sizes)``, into all tables as one, of codes from 0 up and the ``reach`` before them."""
        L = line.shape[1] - self.reach
        # (Not `unfold`: torch.export would have it for long pieces only.)
        windows = torch.stack([line[:, at : at + L] for at in range(self.reach, -1, -1)], 2)  # the newest first
        starts = None if layout is None else layout.starts()
        if starts is not None:
            # Before the first reset all of the past counts, where what is no part of the document is zeros.
            back = torch.arange(L, device=line.device) - starts
            back = torch.where(starts < 0, self.reach, back)
            windows = torch.where(torch.arange(self.reach + 1, device=line.device) <= back[..., None], windows, 0)
        sums = (windows * self.powers).cumsum(2)
        return _mixed(sums[..., self.ends]) % self.rows + self.firsts


def _mixed(hashed: Tensor) -> Tensor:
    """Every bit in the lowest too: twice the upper half into the lower, and a product between."""
    hashed = (hashed ^ (hashed >> 32)) * MIX
    return hashed ^ (hashed >> 32)


def _signed(number: int) -> int:
    """64 bits as int64 has them."""
    return (number + 2**63) % 2**64 - 2**63

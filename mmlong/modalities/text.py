"""Text as a sequence of bytes: 256 codes, no tokenizer, no vocabulary, nothing to go out of date.

Any bytes are text here. UTF-8 is what they usually are, and nobody looks: invalid UTF-8, NUL bytes and whole binaries are encoded and come back unchanged
(as in ByT5, Xue et al. 2022, arXiv 2105.13626, without its special tokens: padding is told by lengths, a document's beginning by resets).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, register_modality, row_layout


@register_modality("text")
class TextModality(Modality):
    """Bytes in sequence.

    Args:
        dim: width D.
    """

    kind = "text"
    unit = "byte"
    codes = 256
    levels = 256

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.byte = nn.Embedding(256, dim)

    @property
    def code_embedding(self) -> nn.Embedding:
        return self.byte

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, T)`` to int64 codes ``(B, T)``, the same numbers; 0 beyond each row's length.

        Raises:
            TypeError: not uint8.
            ValueError: another shape, or lengths or resets that do not fit.
        """
        if raw.dtype != torch.uint8:
            raise TypeError(f"text is uint8 (B, T), one byte a token; got {raw.dtype}: give the bytes of its encoding")
        if raw.ndim != 2 or raw.shape[1] < 1:
            raise ValueError(f"text is uint8 (B, T) with T >= 1, one byte a token; got {tuple(raw.shape)}")
        layout, valid = row_layout(raw.shape[0], raw.shape[1], lengths, resets)
        return (raw if valid is None else torch.where(valid, raw, 0)).long(), layout

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, L)`` back to uint8 ``(B, L)``; 0 beyond each row's length.

        Raises:
            ValueError: a code outside ``0 .. 255``.
        """
        self.check_codes(tokens)
        valid = None if layout is None else layout.valid(tokens.shape[1])
        return (tokens if valid is None else torch.where(valid, tokens, 0)).to(torch.uint8)

    def values(self, tokens: Tensor) -> Tensor:
        """int64 ``(B, L)`` to ``(B, L, D)``."""
        return self.byte(tokens)

    def example(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Any bytes, rows of any length, resets anywhere."""
        raw = torch.randint(256, (batch, length), dtype=torch.uint8, generator=generator)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1

"""Whole numbers as a sequence: the codes of somebody else's tokenizer, or of anything that was numbered.

What a code stands for is not known here: text is turned into codes, and codes into text, by whoever made them. A model of bytes needs none of this (:mod:`mmlong.modalities.text`); it is what published models of
word pieces read, and so has what they add to a token: a learned vector for each place, a factor on the embedding, a segment type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, looks, register_modality, row_layout


@register_modality("tokens")
class TokensModality(Modality):
    """Codes in sequence.

    Args:
        dim: width D.
        codes: how many codes there are, which are ``0 .. codes - 1``.
        special: further codes behind those, that are read and never predicted, such as one that says where a picture begins.
        places: learned vectors of places, added to a token, and so the longest sequence; ``None``: none, of any length.
        first_place: which of those vectors is the first token's (RoBERTa's is 2; those before it are unused).
        scale: what an embedding is multiplied by (Gemma's is the root of D).
        types: rows of a table of segment types, as BERT has them; tokens here are all of the first type, whose vector is added. 0: no table.

    Raises:
        ValueError: numbers below 1, or no place that is left.
    """

    kind = "tokens"
    unit = "token"

    def __init__(
        self,
        dim: int,
        codes: int = 256,
        special: int = 0,
        places: int | None = None,
        first_place: int = 0,
        scale: float = 1.0,
        types: int = 0,
    ) -> None:
        super().__init__(dim)
        if codes < 1 or min(special, first_place, types) < 0:
            raise ValueError(
                f"tokens: codes must be at least 1, special, first_place and types at least 0; got {codes}, {special}, {first_place}, {types}"
            )
        if places is not None and places <= first_place:
            raise ValueError(f"tokens: of {places} places none is left where the first is number {first_place}")
        self.codes = self.levels = codes
        self.known = codes + special
        self.first_place, self.scale = first_place, scale
        self.code = nn.Embedding(self.known, dim)
        self.place = None if places is None else nn.Embedding(places, dim)
        self.type_table = nn.Embedding(types, dim) if types else None

    @property
    def code_embedding(self) -> nn.Embedding:
        return self.code

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """int64 ``(B, T)`` to the same; 0 beyond each row's length.

        Raises:
            TypeError: not int64.
            ValueError: another shape, lengths or resets that do not fit, or a code that there is not.
        """
        if raw.dtype != torch.int64:
            raise TypeError(f"tokens are int64 (B, T), got {raw.dtype}")
        if raw.ndim != 2 or raw.shape[1] < 1:
            raise ValueError(f"tokens are int64 (B, T) with T >= 1, got {tuple(raw.shape)}")
        layout, valid = row_layout(raw.shape[0], raw.shape[1], lengths, resets)
        tokens = raw.clone() if valid is None else torch.where(valid, raw, 0)
        if looks() and bool(((tokens < 0) | (tokens >= self.known)).any()):
            raise ValueError(f"codes must be 0 .. {self.known - 1}, got {int(tokens.min())} .. {int(tokens.max())}")
        return tokens, layout

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, L)``, the same; 0 beyond each row's length.

        Raises:
            ValueError: a code outside ``0 .. codes - 1``.
        """
        self.check_codes(tokens)
        valid = None if layout is None else layout.valid(tokens.shape[1])
        return tokens.clone() if valid is None else torch.where(valid, tokens, 0)

    def values(self, tokens: Tensor) -> Tensor:
        """int64 ``(B, L)`` to ``(B, L, D)``."""
        x = self.code(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.type_table is None else x + self.type_table.weight[0]

    def places(self, index: Tensor | None, length: int) -> Tensor | None:
        """``(B or 1, L, D)`` of the learned table, or ``None`` without one.

        Raises:
            ValueError: a place beyond the table.
        """
        if self.place is None:
            return None
        most = self.place.num_embeddings - self.first_place
        if index is None:
            index = torch.arange(length, device=self.place.weight.device)[None]
        if looks() and not index.is_meta and index.numel() and int(index.max()) >= most:
            raise ValueError(f"tokens: the model has learned {most} places, and a sequence has {int(index.max()) + 1}")
        vectors: Tensor = self.place(index + self.first_place)
        return vectors

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Plain ones, and with all that may be added."""
        return [
            {"codes": 300},
            {"codes": 11, "special": 2, "places": 70, "first_place": 2, "scale": 3.0, "types": 2},
        ]

    def example(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Any codes, rows of any length, resets anywhere."""
        raw = torch.randint(self.codes or 1, (batch, length), generator=generator)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1

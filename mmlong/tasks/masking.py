"""Which tokens a masked objective chooses, and what becomes of each: BERT's single tokens (Devlin et al. 2019) and spans (SpanBERT, Joshi et al. 2020; T5, Raffel et al. 2020).

A share of a row's valid tokens is chosen, exactly, in spans whose lengths have a mean of ``span``: geometric as in SpanBERT, or all alike. Every arrangement of the
spans among the tokens left visible is equally likely; spans may touch and never overlap. With ``span = 1`` this is every subset of that size: BERT's. A whole span meets
one fate: hidden, replaced by other tokens, or left as it is (BERT's 80, 10 and 10 in a hundred), so that a model cannot trust what it sees at a chosen place.

Departures: SpanBERT and T5 cut or place their spans so that long ones are rarer than said; here only the last is cut, to meet the share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SpanLengths = Literal["geometric", "fixed"]

HIDDEN, REPLACED, KEPT = 1, 2, 3
"""Fates of a chosen token; 0 is one that was not chosen."""


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen.

    Attributes:
        share: of a row's valid tokens that is chosen; at least one token of a row that has any.
        span: mean length of a span; 1 for single tokens.
        lengths: of spans: ``geometric``, or all of them ``span`` (``fixed``).
        hide: share of the spans that are hidden.
        replace: share of the spans that are replaced by other tokens; what is left stays as it is.

    Raises:
        ValueError: a share outside its range, a mean length below 1, or a fixed one that is no whole number.
    """

    share: float = 0.15
    span: float = 1.0
    lengths: SpanLengths = "geometric"
    hide: float = 0.8
    replace: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"masking.share is {self.share}; it is a share of the tokens, above 0 and at most 1")
        if self.lengths not in ("geometric", "fixed"):
            raise ValueError(f"masking.lengths is {self.lengths!r}; it can be geometric or fixed")
        if self.span < 1 or (self.lengths == "fixed" and self.span != int(self.span)):
            raise ValueError(
                f"masking.span is {self.span}; it is a number of tokens, at least 1, whole where lengths are fixed"
            )
        if self.hide < 0 or self.replace < 0 or self.hide + self.replace > 1:
            raise ValueError(
                f"masking.hide {self.hide} and masking.replace {self.replace} are shares that add up to at most 1"
            )

    def draw(self, length: int, generator: torch.Generator) -> Tensor:
        """The fate of each token of one row.

        Args:
            length: L, valid tokens.
            generator: on the CPU.

        Returns:
            int64 ``(L,)`` of 0, ``HIDDEN``, ``REPLACED`` and ``KEPT``.
        """
        fate = torch.zeros(length, dtype=torch.int64)
        if not length:
            return fate
        budget = min(max(round(self.share * length), 1), length)
        sizes = self._sizes(budget, generator)
        spans = sizes.shape[0]
        # Spans and visible tokens are shuffled as so many things in a row; a span then takes its own length of room.
        slots = torch.randperm(length - budget + spans, generator=generator)[:spans].sort().values
        starts = slots - torch.arange(spans) + sizes.cumsum(0) - sizes
        chance = torch.rand(spans, generator=generator)
        met = torch.full((spans,), KEPT)
        met[chance < self.hide + self.replace] = REPLACED
        met[chance < self.hide] = HIDDEN
        inside = torch.arange(budget) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        fate[starts.repeat_interleave(sizes) + inside] = met.repeat_interleave(sizes)
        return fate

    def _sizes(self, budget: int, generator: torch.Generator) -> Tensor:
        """Lengths of spans that add up to ``budget``."""
        if self.lengths == "geometric" and self.span > 1:
            sizes = torch.empty(budget).geometric_(1 / self.span, generator=generator).long()
        else:
            sizes = torch.full((budget,), int(self.span))
        ends = sizes.cumsum(0)
        count = int(torch.searchsorted(ends, budget)) + 1
        sizes = sizes[:count].clone()
        sizes[-1] -= ends[count - 1] - budget
        return sizes


def draw_fates(masking: Masking, lengths: list[int], width: int, generators: list[torch.Generator]) -> Tensor:
    """Fates of a batch, int64 ``(B, width)``, each row from its own generator; 0 at padding."""
    fates = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length, generator in zip(fates, lengths, generators, strict=True):
        row[:length] = masking.draw(length, generator)
    return fates


def replacements(tokens: Tensor, lengths: list[int], codes: int | None, generators: list[torch.Generator]) -> Tensor:
    """Other tokens to put in: codes drawn evenly (BERT's), or for real tokens those of other places in the row.

    Args:
        tokens: ``(B, L)`` of codes or ``(B, L, C)`` real.
        lengths: valid tokens of each row.
        codes: how many codes there are, or ``None``.
        generators: one a row, on the CPU.

    Returns:
        like ``tokens``.
    """
    width = tokens.shape[1]
    drawn = torch.stack(
        [
            torch.randint(max(length, 1) if codes is None else codes, (width,), generator=generator)
            for length, generator in zip(lengths, generators, strict=True)
        ]
    ).to(tokens.device)
    if codes is not None:
        return drawn.to(tokens.dtype)
    return tokens.gather(1, drawn[..., None].expand(-1, -1, tokens.shape[2]))

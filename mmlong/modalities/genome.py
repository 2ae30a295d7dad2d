"""DNA as a sequence of nucleotides: one ASCII letter, one token, no k-mers and no tokenizer.

uint8 letters ``(B, T)`` become codes ``A C G T N`` = ``0 .. 4``. What else a sequence file may hold follows a declared rule:

=================================  ===================================================================================================
``U``                              RNA: read as ``T``
``R Y S W K M B D H V`` (IUPAC)    one of several bases: ``ambiguous="N"`` reads them as ``N``, ``"error"`` refuses them
lower case (soft-masked repeats)   ``soft_masked="upper"`` reads it as upper case, ``"keep"`` as five codes of its own (``5 .. 9``), ``"error"`` refuses it
anything else                      gaps, digits, protein letters: an error that names the letter and where it is
=================================  ===================================================================================================

A stretch of DNA is read from either strand, and the other strand is its *reverse complement*: A and T, C and G change places and the order is reversed.
:func:`reverse_complement` makes it. With ``reverse_complement=True`` the embedding is the equivariant one of Caduceus (Schiff et al. 2024, arXiv 2403.03234):
half of the channels embed the nucleotide, the other half its complement, so that the reverse complement of a sequence has the same channels with halves
exchanged and positions reversed; see :mod:`mmlong.backbone.reverse_complement`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, looks, register_modality, row_layout

LETTERS = b"ACGTN"
"""The letter of each code."""
COMPLEMENT = (3, 2, 1, 0, 4)
"""The code of each code's complement."""
AMBIGUOUS = b"RYSWKMBDHV"
"""IUPAC's letters for one of several bases; ``N``, any base, is a code of its own."""
_OPPOSITE = bytes.maketrans(b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv", b"TGCAANYRSWMKVHDBtgcaanyrswmkvhdb")
N = LETTERS.index(b"N")
AMBIGUOUS_RULES = ("N", "error")
SOFT_MASKED_RULES = ("upper", "keep", "error")
_BAD = 255


def complement_letters(letters: bytes) -> bytes:
    """The other strand of a sequence of letters, IUPAC's included; case is kept, letters that stand for no nucleotide stay."""
    return letters.translate(_OPPOSITE)[::-1]


@lru_cache(maxsize=8)
def letter_codes(ambiguous: str = "N", soft_masked: str = "upper") -> Tensor:
    """uint8 ``(256,)``: the code of each ASCII letter under the declared rules, 255 for a letter that is refused. Shared and cached."""
    codes = [_BAD] * 256
    for code, letter in enumerate(LETTERS):
        codes[letter] = code
    codes[ord("U")] = codes[ord("T")]
    if ambiguous == "N":
        for letter in AMBIGUOUS:
            codes[letter] = N
    if soft_masked != "error":
        for letter in range(ord("A"), ord("Z") + 1):
            if codes[letter] != _BAD:
                codes[letter + 32] = codes[letter] + (len(LETTERS) if soft_masked == "keep" else 0)
    return torch.tensor(codes, dtype=torch.uint8)


def complement(codes: Tensor) -> Tensor:
    """The code opposite each code, in place: int64, any shape."""
    table = [*COMPLEMENT, *(code + len(LETTERS) for code in COMPLEMENT)]
    return torch.tensor(table, device=codes.device)[codes]


def reverse_complement(codes: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The other strand, read in its own direction.

    Args:
        codes: int64 ``(B, L)``, of :class:`GenomeModality`.
        lengths: int64 ``(B,)``, valid codes of each row: padding stays where it is. ``None``: full rows.

    Returns:
        int64 ``(B, L)``; its own inverse.
    """
    return Layout(lengths=lengths).flip_tokens(complement(codes))


@register_modality("genome")
class GenomeModality(Modality):
    """Nucleotides in sequence.

    Args:
        dim: width D.
        ambiguous: what IUPAC's letters for several bases are: ``N``, or an ``error``.
        soft_masked: what lower case is: ``upper`` (the same as upper case), ``keep`` (codes of its own), or an ``error``.
        reverse_complement: embed with half of the channels for each strand, for a backbone with ``reverse_complement``; a model sets it itself.

    Raises:
        ValueError: an unknown rule, or an odd ``dim`` with ``reverse_complement``.
    """

    kind = "genome"
    unit = "nucleotide"

    def __init__(
        self, dim: int, ambiguous: str = "N", soft_masked: str = "upper", reverse_complement: bool = False
    ) -> None:
        super().__init__(dim)
        for what, rule, rules in (
            ("ambiguous", ambiguous, AMBIGUOUS_RULES),
            ("soft_masked", soft_masked, SOFT_MASKED_RULES),
        ):
            if rule not in rules:
                raise ValueError(f"{what} is {rule!r}; it can be {', '.join(rules)}")
        if reverse_complement and dim % 2:
            raise ValueError(f"each strand takes half of the channels, so dim must be even; got {dim}")
        self.ambiguous = ambiguous
        self.soft_masked = soft_masked
        self.reverse_complement = reverse_complement
        self.codes = len(LETTERS) * (2 if soft_masked == "keep" else 1)
        self.levels = self.codes
        self.letter = nn.Embedding(self.codes, dim // 2 if reverse_complement else dim)

    @property
    def code_embedding(self) -> nn.Embedding | None:
        return None if self.reverse_complement else self.letter

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, T)`` of ASCII letters to int64 codes ``(B, T)``; ``N`` beyond each row's length.

        Raises:
            TypeError: not uint8.
            ValueError: another shape, lengths or resets that do not fit, or a letter that is no nucleotide.
        """
        if raw.dtype != torch.uint8:
            raise TypeError(f"DNA is uint8 (B, T) of ASCII letters, got {raw.dtype}: give the letters, not their codes")
        if raw.ndim != 2 or raw.shape[1] < 1:
            raise ValueError(f"DNA is uint8 (B, T) with T >= 1, one ASCII letter a nucleotide; got {tuple(raw.shape)}")
        layout, valid = row_layout(raw.shape[0], raw.shape[1], lengths, resets)
        codes = letter_codes(self.ambiguous, self.soft_masked).to(raw.device)[raw.long()]
        if valid is not None:
            codes = torch.where(valid, codes, N)
        if looks() and bool((bad := codes == _BAD).any()):
            row, place = bad.nonzero()[0].tolist()
            raise ValueError(self._refused(int(raw[row, place]), row, place, int(bad.sum())))
        return codes.long(), layout

    def _refused(self, letter: int, row: int, place: int, count: int) -> str:
        what = f"row {row}, position {place}: {chr(letter)!r}"
        if bytes([letter]).upper() in (bytes([known]) for known in LETTERS + AMBIGUOUS + b"U"):
            rule = "soft_masked" if chr(letter).islower() and self.soft_masked == "error" else "ambiguous"
            return f"{what} is refused by {rule}='error' ({count} such letters in the batch)"
        return (
            f"{what} is no nucleotide ({count} such letters in the batch): DNA is written with A C G T, N and IUPAC's letters "
            "for several bases; remove gaps, and look whether this is protein or text"
        )

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, L)`` to uint8 letters ``(B, L)``: upper case, lower for the kept soft-masked ones, ``N`` beyond each row's length.

        Raises:
            ValueError: a code outside ``0 .. codes - 1``.
        """
        self.check_codes(tokens)
        letters = torch.tensor(list(LETTERS + LETTERS.lower()), dtype=torch.uint8, device=tokens.device)[tokens]
        valid = None if layout is None else layout.valid(tokens.shape[1])
        return letters if valid is None else torch.where(valid, letters, LETTERS[N])

    def values(self, tokens: Tensor) -> Tensor:
        """int64 ``(B, L)`` to ``(B, L, D)``."""
        if not self.reverse_complement:
            return self.letter(tokens)
        return torch.cat([self.letter(tokens), self.letter(complement(tokens))], dim=-1)

    def quantisation(self, raw: Tensor) -> Tensor:
        """0 for the letters of the codes; any distance for a letter that is read as another."""
        exact = torch.zeros(256, dtype=torch.bool, device=raw.device)
        exact[list((LETTERS + LETTERS.lower())[: self.codes])] = True
        return torch.where(exact[raw.long()], 0.0, 255.0)

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Each rule, and the embedding of both strands."""
        return [
            {},
            {"soft_masked": "keep"},
            {"ambiguous": "error", "soft_masked": "error"},
            {"reverse_complement": True},
        ]

    def example(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Letters that the rules take, rows of any length, resets anywhere."""
        taken = (letter_codes(self.ambiguous, self.soft_masked) != _BAD).nonzero()[:, 0].to(torch.uint8)
        raw = taken[torch.randint(len(taken), (batch, length), generator=generator)]
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1

"""Symbolic music of several voices as a sequence of events: who begins which note, goes on, or is silent, step by step of a fixed grid.

The notation of DeepBach (Hadjeres, Pachet & Nielsen 2017, arXiv 1612.01010): a code a voice and step, which is a pitch (0 to 127, as MIDI numbers them: a note that begins), :data:`HOLD` (the last one goes on) or :data:`REST`.
A step is as many tokens as there are voices, in their order, so a model that goes from left to right hears the first voice of a step before it writes the second (there: of all sides at once, by Gibbs sampling).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, looks, register_modality, row_layout

HOLD, REST, CODES = 128, 129, 130


@register_modality("music")
class MusicModality(Modality):
    """Voices on a grid of steps.

    Args:
        dim: width D.
        voices: V, parts that sound together, each one note at a time.
        period: steps after which a place in the bar comes again, as far as places tell it (16 sixteenths: a bar of 4/4).
    """

    kind = "music"
    unit = "event"
    codes = CODES
    levels = CODES

    def __init__(self, dim: int, voices: int = 4, period: int = 16) -> None:
        super().__init__(dim)
        if min(voices, period) < 1:
            raise ValueError(f"music has at least one voice and a period of at least one step, got {voices}, {period}")
        self.voices, self.period = voices, period
        self.tokens_per_step = voices
        self.event = nn.Embedding(CODES, dim)
        self.voice = nn.Embedding(voices, dim)
        self.step = nn.Embedding(period, dim)

    @property
    def code_embedding(self) -> nn.Embedding:
        return self.event

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, V, T)`` to int64 ``(B, T * V)``, step after step; 0 beyond each row's length.

        Raises:
            TypeError: not uint8.
            ValueError: another shape, lengths or resets (of steps) that do not fit, or a code that there is not.
        """
        if raw.dtype != torch.uint8:
            raise TypeError(f"music is uint8 (B, {self.voices}, T), got {raw.dtype}")
        if raw.ndim != 3 or raw.shape[1] != self.voices or raw.shape[2] < 1:
            raise ValueError(f"this model reads music (B, {self.voices}, T), T >= 1, got {tuple(raw.shape)}")
        _, valid = row_layout(raw.shape[0], raw.shape[2], lengths, resets)
        steps = raw if valid is None else torch.where(valid[:, None], raw, 0)
        if looks() and int(steps.max()) >= CODES:
            raise ValueError(f"an event is a pitch 0 .. 127, {HOLD} (hold) or {REST} (rest), got {int(steps.max())}")
        begins = None
        if resets is not None:
            first = torch.arange(self.voices, device=resets.device) == 0
            begins = (resets[..., None] & first).flatten(1)
        layout = Layout(lengths=None if lengths is None else lengths * self.voices, resets=begins)
        return steps.transpose(1, 2).flatten(1).long(), layout

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, T * V)`` back to uint8 ``(B, V, T)``; 0 beyond each row's length.

        Raises:
            ValueError: a code that there is not, or a step that is not whole.
        """
        self.check_codes(tokens)
        if tokens.shape[1] % self.voices:
            raise ValueError(f"a step is {self.voices} events, one a voice: {tokens.shape[1]} are no whole steps")
        valid = None if layout is None else layout.valid(tokens.shape[1])
        kept = tokens if valid is None else torch.where(valid, tokens, 0)
        return kept.unflatten(1, (-1, self.voices)).transpose(1, 2).to(torch.uint8).contiguous()

    def values(self, tokens: Tensor) -> Tensor:
        """int64 ``(B, L)`` to ``(B, L, D)``."""
        return self.event(tokens)

    def places(self, index: Tensor | None, length: int) -> Tensor:
        """Whose event it is, and where in the period: ``(B or 1, L, D)``."""
        if index is None:
            index = torch.arange(length, device=self.step.weight.device)[None]
        return self.voice(index % self.voices) + self.step(index // self.voices % self.period)

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """A choir, and one voice."""
        return [{"voices": 4}, {"voices": 1, "period": 3}]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Any events, rows of any length, resets anywhere."""
        raw = torch.randint(CODES, (batch, self.voices, length), generator=generator).to(torch.uint8)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1

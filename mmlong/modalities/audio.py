"""Sounds as sequences of samples: the waveform itself, or its 8-bit mu-law codes. No spectrogram, no frames.

A recording is float32, full scale at -1 and 1, at a rate that is declared and the same for all a model hears; resampling is done where files are read, not
here. Two modalities over the one companding curve of ITU-T G.711 (continuous form, mu = 255, as WaveNet uses it, van den Oord et al. 2016)::

    compand(x) = sign(x) log(1 + mu |x|) / log(1 + mu)

- ``audio``: a token is the C numbers of one moment, real and unchanged. Its stem sees each number twice, as it is and companded: speech spends most of its time
  within a few hundredths of zero, where a linear layer by itself hears next to nothing.
- ``mulaw``: a token is one of 256 codes. Channels are interleaved (L R L R ...), since a code holds one number.

Where a sample stands is not told (``places`` is ``None``): a sound may begin anywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, looks, register_modality

MU = 255


def compand(x: Tensor) -> Tensor:
    """The mu-law curve: odd, rising, 0 to 0 and 1 to 1. It goes on beyond full scale, ever flatter."""
    return x.sign() * torch.log1p(MU * x.abs()) / math.log1p(MU)


def expand(y: Tensor) -> Tensor:
    """The inverse of :func:`compand`."""
    return y.sign() * torch.expm1(y.abs() * math.log1p(MU)) / MU


def mulaw_encode(x: Tensor) -> Tensor:
    """Real samples to codes 0..255, int64: torchaudio's ``MuLawEncoding``, with samples beyond full scale clipped to it."""
    return ((compand(x.clamp(-1, 1)) + 1) / 2 * MU + 0.5).long()


def mulaw_decode(codes: Tensor) -> Tensor:
    """Codes 0..255 to float32 samples: torchaudio's ``MuLawDecoding``."""
    return expand(codes.float() / MU * 2 - 1)


def waveform(raw: Tensor, channels: int, lengths: Tensor | None) -> Tensor:
    """A batch of recordings, checked, as ``(B, T, C)`` with zeros past each row's length.

    Raises:
        TypeError: not float32.
        ValueError: another shape than ``(B, T)`` (one channel) or ``(B, channels, T)``, lengths that do not fit, or a valid sample that is NaN or infinite.
    """
    if raw.dtype != torch.float32:
        raise TypeError(
            f"a sound is float32 with full scale at -1 and 1, got {raw.dtype}: divide 16-bit integers by 32,768"
        )
    given = tuple(raw.shape)
    if raw.ndim == 2:
        raw = raw[:, None]
    if raw.ndim != 3 or raw.shape[1] != channels:
        due = f"{channels} channels, (B, {channels}, T)" if channels > 1 else "1 channel, (B, T)"
        raise ValueError(f"this model hears {due}, got {given}")
    layout = Layout(lengths=lengths)
    layout.check(raw.shape[0], raw.shape[2])
    valid = layout.valid(raw.shape[2])
    if lengths is not None and looks() and bool(((lengths < 0) | (lengths > raw.shape[2])).any()):
        raise ValueError(f"lengths must be between 0 and the {raw.shape[2]} samples there are, got {lengths.tolist()}")
    if valid is not None:
        raw = torch.where(valid[:, None], raw, 0)
    if looks() and not bool(raw.isfinite().all()):
        row, _, moment = (int(place) for place in (~raw.isfinite()).nonzero()[0])
        raise ValueError(f"row {row} has a sample that is NaN or infinite, the first at {moment:,}: a sound is finite")
    return raw.transpose(1, 2)


class Sound(Modality):
    """What both modalities share: the declared rate and channels.

    Args:
        dim: width D.
        rate: samples a second of every recording. It changes nothing here; whoever reads or writes files goes by it.
        channels: of a recording: 1 (mono) or more.
    """

    kind = "audio"
    unit = "sample"

    def __init__(self, dim: int, rate: int, channels: int = 1) -> None:
        super().__init__(dim)
        if rate < 1 or channels < 1:
            raise ValueError(f"a sound has a rate and channels of at least 1, got rate {rate} and {channels} channels")
        self.rate: int = rate
        self.sound_channels = channels

    def resample(self, rate: int) -> None:
        """Recordings are of another rate from now on.

        Raises:
            ValueError: a rate below 1.
        """
        if rate < 1:
            raise ValueError(f"a sound has a rate of at least 1, got {rate}")
        self.rate = rate

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Mono and stereo."""
        return [{"rate": 8000}, {"rate": 44100, "channels": 2}]

    def example(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Noise, most of it near zero as in speech, and a sample at full scale; rows of any length, resets anywhere."""
        shape = (batch, length) if self.sound_channels == 1 else (batch, self.sound_channels, length)
        raw = (torch.rand(shape, generator=generator) * 2 - 1) ** 5
        raw[..., 0] = raw[..., 0].sign()
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        return raw, lengths, torch.rand(batch, length, generator=generator) < 0.1


@register_modality("audio")
class AudioModality(Sound):
    """The waveform as real numbers: a token is one moment of all channels.

    Samples beyond full scale are legal and kept (float recordings have them, so has a gain).

    Args:
        dim, rate, channels: see :class:`Sound`.
        bits: of the recordings' integers ``k``, of which samples are ``k / 2^(bits - 1)``; null where they are no such numbers, and then have no
            probability either. ``levels`` is ``2^bits + 1``, the steps from -1 to 1, of which an integer never reaches the last.
    """

    def __init__(self, dim: int, rate: int, channels: int = 1, bits: int | None = 16) -> None:
        super().__init__(dim, rate, channels)
        if bits is not None and not 1 <= bits <= 24:
            raise ValueError(f"bits is {bits}; samples are integers of 1 to 24 bits, or null for real numbers")
        self.channels = channels
        self.levels = None if bits is None else 2**bits + 1
        self.sample = nn.Linear(2 * channels, dim)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """float32 ``(B, T)`` or ``(B, C, T)`` to float32 ``(B, T, C)``, unchanged; what lies past a row's length becomes 0.

        Raises:
            TypeError, ValueError: see :func:`waveform`.
        """
        tokens = waveform(raw, self.sound_channels, lengths)
        layout = Layout(lengths=lengths, resets=resets)
        layout.check(*tokens.shape[:2])
        return tokens, layout

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, T, C)`` back to float32 ``(B, T)`` (one channel) or ``(B, C, T)``."""
        raw = tokens.float().transpose(1, 2)
        return raw[:, 0] if self.sound_channels == 1 else raw

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L, C)`` to ``(B, L, D)``: each number and its companded value, projected."""
        return self.sample(torch.cat([tokens, compand(tokens)], dim=-1).to(self.sample.weight.dtype))


@register_modality("mulaw")
class MuLawModality(Sound):
    """8-bit mu-law codes: a token is one sample of one channel.

    ``decode(encode(raw))`` is within half a step of the curve: at most 0.022 at full scale and 0.00009 near zero. Samples beyond full scale are clipped to it.

    Args:
        dim, rate, channels: see :class:`Sound`. With C channels there are C tokens a moment, interleaved, and lengths are C times as long.
    """

    codes = MU + 1
    levels = MU + 1

    def __init__(self, dim: int, rate: int, channels: int = 1) -> None:
        super().__init__(dim, rate, channels)
        self.tokens_per_step = channels
        self.code = nn.Embedding(MU + 1, dim)
        self.level = nn.Linear(2, dim, bias=False)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """float32 ``(B, T)`` or ``(B, C, T)`` to codes int64 ``(B, T * C)``; what lies past a row's length becomes silence (code 128).

        Raises:
            TypeError, ValueError: see :func:`waveform`.
        """
        wave = waveform(raw, self.sound_channels, lengths)
        Layout(resets=resets).check(*wave.shape[:2])
        if resets is not None and self.sound_channels > 1:
            later = torch.zeros_like(resets).unsqueeze(2).expand(-1, -1, self.sound_channels - 1)
            resets = torch.cat([resets.unsqueeze(2), later], 2).flatten(1)
        lengths = None if lengths is None else lengths * self.sound_channels
        return mulaw_encode(wave).flatten(1), Layout(lengths=lengths, resets=resets)

    def resample(self, rate: int) -> None:
        """As a waveform's, where there is one channel.

        Raises:
            ValueError: channels that take turns, which is a pattern of tokens and not of time.
        """
        if self.sound_channels > 1:
            raise ValueError(
                f"the codes of {self.sound_channels} channels take turns, at every rate alike: a mixer would take their turns for something in time. Use modality audio, or one channel"
            )
        super().resample(rate)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, T * C)`` to float32 ``(B, T)`` (one channel) or ``(B, C, T)``.

        Raises:
            ValueError: a code outside 0..255, or a number of codes that is not whole moments of C channels.
        """
        self.check_codes(tokens)
        if tokens.shape[1] % self.sound_channels:
            raise ValueError(f"{tokens.shape[1]} codes are not whole moments of {self.sound_channels} channels")
        raw = mulaw_decode(tokens).unflatten(1, (-1, self.sound_channels)).transpose(1, 2)
        return raw[:, 0] if self.sound_channels == 1 else raw

    def quantisation(self, raw: Tensor) -> Tensor:
        """Half a step of the curve where the sample is, and what clipping takes off beyond full scale."""
        wide = raw.double()
        heard = wide.clamp(-1, 1)
        level, half = compand(heard), 1 / MU
        step = torch.maximum(expand(level + half) - heard, heard - expand(level - half))
        # Codes are found and read in float32.
        return step + (wide - heard).abs() + 1e-6

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``: a vector a code, and its level projected, so that neighbouring codes are alike from the start."""
        level = torch.stack([mulaw_decode(tokens), tokens.float() / MU * 2 - 1], dim=-1)
        return self.code(tokens) + self.level(level.to(self.level.weight.dtype))

"""Multivariate time series at irregular times: a token is one moment, the values that were observed then, which those were, and how long it had been since the moment before.

The times themselves are in ``Layout.positions``. A model that is to tell a short gap from a long one must be told it: the gap is part of the token, as in GRU-D (Che et al. 2018, Scientific Reports 8:6085); what is missing is 0 after standardisation, the mean, and its mask says that
it is missing. Means, deviations and the typical gap are taken from training data (:meth:`SeriesModality.initialise`) and saved with the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import Modality, looks, register_modality, row_layout


@register_modality("series")
class SeriesModality(Modality):
    """Moments in the order of their times.

    Args:
        dim: width D.
        channels: C, values of a moment.
    """

    kind = "series"
    unit = "moment"
    mean: Tensor
    scale: Tensor
    gap: Tensor
    fitted: Tensor

    def __init__(self, dim: int, channels: int = 1) -> None:
        super().__init__(dim)
        if channels < 1:
            raise ValueError(f"a series has at least 1 channel, got {channels}")
        self.width = channels
        self.channels = 2 * channels + 1
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("gap", torch.tensor(1.0))
        self.register_buffer("fitted", torch.tensor(False))
        self.moment = nn.Linear(2 * channels + 1, dim)

    @property
    def initialised(self) -> bool:
        """Whether means and deviations were taken from data."""
        return not looks() or bool(self.fitted)

    def initialise(self, raw: Tensor, seed: int = 0) -> None:
        """Take mean and deviation of each channel, and the mean gap, from series as :meth:`encode` takes them."""
        _, values, seen = raw.split([1, self.width, self.width], dim=1)
        count = seen.sum((0, 2)).clamp_min(1)
        self.mean.copy_((values * seen).sum((0, 2)) / count)
        self.scale.copy_((((values - self.mean[:, None]) * seen).square().sum((0, 2)) / count).sqrt().clamp_min(1e-6))
        gaps = raw[:, 0].diff(dim=1)
        # What stands past a row's end is no time: zeros down to the last column.
        within = (raw != 0).any(1).flip(1).cumsum(1).flip(1)[:, 1:] > 0
        gaps = gaps[within & (gaps > 0)]
        self.gap.copy_(gaps.mean() if len(gaps) else torch.tensor(1.0))
        self.fitted.fill_(True)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """float32 ``(B, 1 + 2 C, T)``, rows time, C values and C masks (1 observed, 0 missing), to float32 ``(B, T, 2 C + 1)``, values, masks and gap, with ``positions`` ``(B, T, 1)``.

        Values that are missing become 0, and so does what lies past a row's length. The first gap is 0.

        Raises:
            TypeError: not float32.
            ValueError: another shape, numbers that are not finite, times that go back, masks of other numbers, lengths that do not fit, or resets.
        """
        rows = 1 + 2 * self.width
        if raw.dtype != torch.float32:
            raise TypeError(f"a series is float32 (B, {rows}, T), got {raw.dtype}")
        if raw.ndim != 3 or raw.shape[1] != rows or raw.shape[2] < 1:
            raise ValueError(
                f"this model reads series (B, {rows}, T), T >= 1: time, {self.width} values, {self.width} masks; got {tuple(raw.shape)}"
            )
        if resets is not None:
            raise ValueError("a series is a row of its own: it takes no resets")
        _, valid = row_layout(raw.shape[0], raw.shape[2], lengths)
        raw = raw if valid is None else torch.where(valid[:, None], raw, 0)
        time, values, seen = raw.transpose(1, 2).split([1, self.width, self.width], dim=2)
        gap = torch.cat([torch.zeros_like(time[:, :1]), time.diff(dim=1)], 1)
        gap = gap if valid is None else torch.where(valid[..., None], gap, 0)
        if looks():
            self._refuse(raw, seen, gap)
        tokens = torch.cat([torch.where(seen > 0, values, 0), seen, gap], -1)
        return tokens, Layout(lengths=lengths, positions=time)

    def _refuse(self, raw: Tensor, seen: Tensor, gap: Tensor) -> None:
        if not bool(raw.isfinite().all()):
            raise ValueError("a series has a number that is NaN or infinite: what is missing is told by its mask")
        if bool(((seen != 0) & (seen != 1)).any()):
            raise ValueError("the masks of a series are 1 (observed) and 0 (missing)")
        if bool((gap < 0).any()):
            row, moment = (int(n) for n in (gap[..., 0] < 0).nonzero()[0])
            raise ValueError(f"row {row}: the time goes back at moment {moment}; order a series by its times")

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, T, 2 C + 1)`` back to float32 ``(B, 1 + 2 C, T)``; without a layout's times they are counted from 0, by the gaps."""
        values, seen, gap = tokens.float().split([self.width, self.width, 1], dim=2)
        time = gap.cumsum(1) if layout is None or layout.positions is None else layout.positions.expand_as(gap)
        return torch.cat([time, values, seen], -1).transpose(1, 2).contiguous()

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, T, 2 C + 1)`` to ``(B, T, D)``: standardised values, masks, and the gap's logarithm, projected."""
        values, seen, gap = tokens.split([self.width, self.width, 1], dim=2)
        known = torch.where(seen > 0, (values - self.mean) / self.scale, 0)
        return self.moment(torch.cat([known, seen, (gap / self.gap).log1p()], -1).to(self.moment.weight.dtype))

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """One channel, and three."""
        return [{}, {"channels": 3}]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
        """Times from anywhere, some gaps of 0, a third of the values missing."""
        gaps = torch.randint(0, 64, (batch, 1, length), generator=generator) / 16
        seen = (torch.rand(batch, self.width, length, generator=generator) < 0.7).float()
        values = torch.randn(batch, self.width, length, generator=generator) * seen
        raw = torch.cat([gaps.cumsum(2) - 5, values, seen], 1)
        return raw, torch.randint(1, length + 1, (batch,), generator=generator), None

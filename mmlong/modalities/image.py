"""Images as sequences of real-valued pixels: one token a pixel, no patches.

A uint8 image ``(B, C, H, W)`` becomes ``H * W`` tokens of ``C`` real values in [-1, 1], unrolled by a scan order. :meth:`ImageModality.decode` is its exact
inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import register_modality
from mmlong.modalities.pixels import PixelModality


@register_modality("image")
class ImageModality(PixelModality):
    """Pixels in sequence, their numbers real.

    Args:
        dim, size, channels, order, bands: see :class:`~mmlong.modalities.pixels.PixelModality`.
    """

    levels = 256

    def __init__(
        self, dim: int, size: list[int] | tuple[int, ...], channels: int = 1, order: str = "morton", bands: int = 6
    ) -> None:
        super().__init__(dim, size, channels, order, bands)
        self.channels = channels
        self.pixel = nn.Linear(channels, dim)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, C, H, W)`` to float ``(B, H * W, C)`` in [-1, 1], and the grid.

        Raises:
            TypeError, ValueError: see :meth:`~mmlong.modalities.pixels.PixelModality.unroll`.
        """
        pixels = self.unroll(raw, lengths, resets)
        return pixels.float() / 127.5 - 1, Layout(grid=self.size, order=self.order)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, H * W, C)`` back to uint8 ``(B, C, H, W)``, rounded and clamped."""
        return self.roll(((tokens.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L, C)`` to ``(B, L, D)``."""
        return self.pixel(tokens.to(self.pixel.weight.dtype))

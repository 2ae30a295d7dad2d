"""Images as sequences of bytes: one token a sub-pixel, 256 codes, as PixelRNN (van den Oord et al. 2016) and Sparse Transformers (Child et al. 2019) model them.

A uint8 image ``(B, C, H, W)`` becomes ``H * W * C`` codes, pixel by pixel in a scan order, the channels of a pixel next to each other. With one channel that is grey,
a code a pixel. The image is in the codes exactly. The vector of a code is looked up, and its level is projected beside it, so that neighbouring levels are
alike from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import register_modality
from mmlong.modalities.pixels import PixelModality


@register_modality("image_bytes")
class ImageBytesModality(PixelModality):
    """Sub-pixels in sequence, channel fastest.

    Args:
        dim, size, channels, order, bands: see :class:`~mmlong.modalities.pixels.PixelModality`; the order is that of pixels.
    """

    unit = "byte"
    codes = 256
    levels = 256

    def __init__(
        self, dim: int, size: list[int] | tuple[int, int], channels: int = 1, order: str = "raster", bands: int = 6
    ) -> None:
        super().__init__(dim, size, channels, order, bands)
        self.code = nn.Embedding(256, dim)
        self.level = nn.Linear(1, dim, bias=False)
        self.colour = nn.Embedding(channels, dim)

    def tokens_per_sample(self) -> int:
        """``H * W * C``."""
        return self.pixels * self.image[0]

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, C, H, W)`` to int64 codes ``(B, H * W * C)``, and the grid ``(H, W, C)``.

        Raises:
            TypeError, ValueError: see :meth:`~mmlong.modalities.pixels.PixelModality.unroll`.
        """
        codes = self.unroll(raw, lengths, resets).flatten(1).long()
        # The same order as pixels:raster, by the name that everybody knows.
        order = "raster" if self.order == "raster" else f"pixels:{self.order}"
        return codes, Layout(grid=(*self.size, self.image[0]), order=order)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, H * W * C)`` back to uint8 ``(B, C, H, W)``.

        Raises:
            ValueError: a code outside 0..255, or not the bytes of one whole image a row.
        """
        self.check_codes(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens_per_sample():
            raise ValueError(
                f"an image is decoded from its {self.tokens_per_sample()} bytes, (B, {self.tokens_per_sample()}), got {tuple(tokens.shape)}"
            )
        return self.roll(tokens.to(torch.uint8).unflatten(1, (self.pixels, self.image[0])))

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``."""
        level = (tokens.unsqueeze(-1).float() / 127.5 - 1).to(self.level.weight.dtype)
        return self.code(tokens) + self.level(level)

    def places(self, index: Tensor | None, length: int) -> Tensor:
        """Row, column and channel of each byte: Fourier features of the pixel, projected, and a learned vector of the channel.

        Raises:
            ValueError: more or fewer bytes than the image has, where no index says which.
        """
        channels = self.image[0]
        if index is not None:
            return super().places(index.div(channels, rounding_mode="floor"), length) + self.colour(index % channels)
        if length != self.tokens_per_sample():
            raise ValueError(f"this model embeds whole images of {self.tokens_per_sample()} bytes, got {length}")
        # A pixel's features are projected once for all its channels.
        return (super().places(None, self.pixels).unsqueeze(2) + self.colour.weight).flatten(1, 2)

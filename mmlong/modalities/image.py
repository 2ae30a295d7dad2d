"""Images as sequences of pixels: one token a pixel, no patches.

A uint8 image ``(B, C, H, W)`` becomes ``H * W`` tokens of ``C`` real values in [-1, 1], unrolled by a scan order. :meth:`ImageModality.decode` is its exact
inverse. The position of a pixel is known to the model: Fourier features of its row and column (Tancik et al. 2020) are projected and added to the pixel's
own projection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmlong.layout import SCAN_ORDERS, Layout, scan_order
from mmlong.modalities.contract import Modality, register_modality


def fourier_features(coordinates: Tensor, extent: tuple[int, ...], bands: int) -> Tensor:
    """Sines and cosines of coordinates at octaves of frequency.

    Args:
        coordinates: ``(..., k)`` in cells.
        extent: cells along each of the ``k`` axes; the slowest wave is half a period over it.
        bands: octaves.

    Returns:
        ``(..., 2 * bands * k)``.
    """
    scale = torch.tensor([math.pi / max(n - 1, 1) for n in extent], device=coordinates.device)
    octaves = 2.0 ** torch.arange(bands, device=coordinates.device)
    angles = (coordinates.float() * scale).unsqueeze(-1) * octaves
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


@register_modality("image")
class ImageModality(Modality):
    """Pixels in sequence.

    Args:
        dim: width D.
        size: ``[H, W]``, any sizes.
        channels: C, 1 (grey) or 3 (RGB).
        order: scan order, one of :data:`mmlong.layout.SCAN_ORDERS`.
        bands: octaves of the Fourier position features.
    """

    unit = "pixel"
    levels = 256
    order_index: Tensor
    inverse_index: Tensor
    features: Tensor

    def __init__(
        self, dim: int, size: list[int] | tuple[int, int], channels: int = 1, order: str = "morton", bands: int = 6
    ) -> None:
        super().__init__(dim)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image size is [H, W], got {list(size)}")
        if order not in SCAN_ORDERS:
            raise ValueError(f"unknown scan order {order!r}; known: {', '.join(SCAN_ORDERS)}")
        self.size = (int(size[0]), int(size[1]))
        self.channels = channels
        self.order = order
        index = scan_order(self.size, order).clone()  # the cached one is everybody's
        self.register_buffer("order_index", index, persistent=False)
        self.register_buffer("inverse_index", torch.argsort(index), persistent=False)
        cells = torch.stack(torch.unravel_index(index, self.size), dim=-1)
        self.register_buffer("features", fourier_features(cells, self.size, bands), persistent=False)
        self.pixel = nn.Linear(channels, dim)
        self.place = nn.Linear(self.features.shape[-1], dim, bias=False)

    def tokens_per_sample(self) -> int:
        """``H * W``."""
        return self.size[0] * self.size[1]

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, C, H, W)`` to float ``(B, H * W, C)`` in [-1, 1], and the grid.

        Raises:
            TypeError: not uint8.
            ValueError: another shape than ``(B, channels, *size)``, or lengths or resets: an image is whole.
        """
        if lengths is not None or resets is not None:
            raise ValueError("images are whole and one a row: they take neither lengths nor resets")
        if raw.dtype != torch.uint8:
            raise TypeError(f"an image is uint8 (B, C, H, W), got {raw.dtype}: scale floats to 0..255 and round")
        if raw.ndim != 4 or tuple(raw.shape[1:]) != (self.channels, *self.size):
            raise ValueError(
                f"this model reads images (B, {self.channels}, {self.size[0]}, {self.size[1]}), got {tuple(raw.shape)}"
            )
        flat = raw.flatten(2)[:, :, self.order_index].transpose(1, 2)
        return flat.float() / 127.5 - 1, Layout(grid=self.size, order=self.order)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, H * W, C)`` back to uint8 ``(B, C, H, W)``, rounded and clamped."""
        pixels = ((tokens.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.transpose(1, 2)[:, :, self.inverse_index].unflatten(2, self.size).contiguous()

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L, C)`` to ``(B, L, D)``."""
        return self.pixel(tokens.to(self.pixel.weight.dtype))

    def places(self, index: Tensor | None, length: int) -> Tensor:
        """Row and column of each pixel as Fourier features, projected; once for the whole batch where all rows agree.

        Raises:
            ValueError: more pixels than the image has.
        """
        if index is None and length != self.features.shape[0]:
            raise ValueError(f"this model embeds whole images of {self.features.shape[0]} pixels, got {length}")
        features = self.features[None] if index is None else self.features[index]
        return self.place(features.to(self.place.weight.dtype))

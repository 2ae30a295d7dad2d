"""What every image modality shares: the scan order by which pixels become a sequence, its inverse, and positions known to the model.

An image ``(B, C, H, W)`` is unrolled pixel by pixel in a scan order of :func:`mmlong.layout.scan_order`, of any height and width. Where a pixel stands is told by
Fourier features of its row and column (Tancik et al. 2020), projected; a modality adds them to what the pixel is. A video ``(B, C, F, H, W)`` is the same with one axis more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import scan_order
from mmlong.modalities.contract import Modality


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


class PixelModality(Modality):
    """Base of the image modalities.

    Args:
        dim: width D.
        size: ``[H, W]`` (of a video ``[F, H, W]``), any sizes.
        channels: numbers of a pixel, 1 (grey) or 3 (RGB).
        order: scan order, see :func:`mmlong.layout.scan_order`.
        bands: octaves of the Fourier position features; 0 for a model that is not told where a pixel is.

    Attributes:
        image: shape ``(C, *size)`` of an image.
        thing, axes: what is read, in words, and the names of the axes of its size.
    """

    kind = "image"
    unit = "pixel"
    thing = "an image"
    axes: tuple[str, ...] = ("H", "W")
    order_index: Tensor
    inverse_index: Tensor
    features: Tensor

    def __init__(
        self, dim: int, size: list[int] | tuple[int, ...], channels: int = 1, order: str = "morton", bands: int = 6
    ) -> None:
        super().__init__(dim)
        if len(size) != len(self.axes) or min(size) < 1:
            raise ValueError(f"the size of {self.thing} is [{', '.join(self.axes)}], got {list(size)}")
        if channels < 1:
            raise ValueError(f"{self.thing} has at least 1 channel, got {channels}")
        if bands < 0:
            raise ValueError(f"bands, octaves of the position features, are at least 0, got {bands}")
        self.size = tuple(int(n) for n in size)
        self.image = (channels, *self.size)
        self.order = order
        index = scan_order(self.size, order).clone()  # the cached one is everybody's
        self.register_buffer("order_index", index, persistent=False)
        self.register_buffer("inverse_index", torch.argsort(index), persistent=False)
        cells = torch.stack(torch.unravel_index(index, self.size), dim=-1)
        self.register_buffer("features", fourier_features(cells, self.size, bands), persistent=False)
        self.place = nn.Linear(self.features.shape[-1], dim, bias=False) if bands else None

    @property
    def pixels(self) -> int:
        """How many there are, ``H * W``."""
        return math.prod(self.size)

    def tokens_per_sample(self) -> int:
        """``H * W``, a token a pixel."""
        return self.pixels

    def unroll(self, raw: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Tensor:
        """uint8 ``(B, C, H, W)`` to uint8 pixels ``(B, H * W, C)`` in scan order.

        Raises:
            TypeError, ValueError: see :meth:`check_image`.
        """
        self.check_image(raw, lengths, resets)
        return raw.flatten(2)[:, :, self.order_index].transpose(1, 2)

    def check_image(self, raw: Tensor, lengths: Tensor | None, resets: Tensor | None) -> None:
        """Refuse what is no batch of this model's images.

        Raises:
            TypeError: not uint8.
            ValueError: another shape than ``(B, channels, *size)``, or lengths or resets: an image is whole.
        """
        if lengths is not None or resets is not None:
            raise ValueError(f"{self.thing} is whole and alone in its row: it takes neither lengths nor resets")
        if raw.dtype != torch.uint8:
            axes = ", ".join(("B", "C", *self.axes))
            raise TypeError(f"{self.thing} is uint8 ({axes}), got {raw.dtype}: scale floats to 0..255 and round")
        if tuple(raw.shape[1:]) != self.image:
            wanted = ", ".join(str(n) for n in self.image)
            raise ValueError(f"this model reads {self.kind}s (B, {wanted}), got {tuple(raw.shape)}")

    def roll(self, pixels: Tensor) -> Tensor:
        """The inverse of :meth:`unroll`: ``(B, H * W, C)`` to ``(B, C, H, W)``.

        Raises:
            ValueError: not the pixels of one whole image a row.
        """
        if pixels.ndim != 3 or tuple(pixels.shape[1:]) != (self.pixels, self.image[0]):
            raise ValueError(
                f"{self.thing} is decoded from its {self.pixels} {self.unit}s of {self.image[0]} numbers each, got tokens for {tuple(pixels.shape)}"
            )
        return pixels.transpose(1, 2)[:, :, self.inverse_index].unflatten(2, self.size).contiguous()

    def places(self, index: Tensor | None, length: int) -> Tensor:
        """Row and column of each pixel as Fourier features, projected; once for the whole batch where all rows agree.

        Raises:
            ValueError: more or fewer pixels than the image has, where no index says which.
        """
        if index is None and length != self.pixels:
            raise ValueError(f"this model embeds whole {self.kind}s of {self.pixels} {self.unit}s, got {length}")
        features = self.features[None] if index is None else self.features[index]
        if self.place is None:
            return next(self.parameters()).new_zeros(1).expand(*features.shape[:-1], self.dim)
        return self.place(features.to(self.place.weight.dtype))

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Grey and colour, odd sizes, one pixel, and each kind of order."""
        return [
            {"size": [5, 7], "channels": 1, "order": "hilbert"},
            {"size": [4, 6], "channels": 3, "order": "random:5"},
            {"size": [9, 2], "channels": 3, "order": "block_raster:3"},
            {"size": [1, 1], "channels": 1, "order": "raster"},
        ]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, None, None]:
        """Noise of the image's own size."""
        return torch.randint(256, (batch, *self.image), generator=generator, dtype=torch.uint8), None, None

"""Videos as sequences of real-valued pixels on a grid of frames, height and width: one token a pixel of a frame, no patches.

An image with one axis more (:mod:`mmlong.modalities.pixels`): a uint8 video ``(B, C, F, H, W)`` becomes ``F * H * W`` tokens of ``C`` numbers in [-1, 1], in a scan order of the three axes (``raster``: frame after frame; ``morton`` and ``hilbert``: small
blocks of space and time after one another). Mixers over grids read ``Layout.grid = (F, H, W)``: ``axial`` with three axes, or time and space in turns, ``{name: axial, axes: 3, along: [0]}`` and ``along: [1, 2]``, the factorised attention of
TimeSformer (Bertasius et al. 2021, arXiv 2102.05095) and ViViT (Arnab et al. 2021, arXiv 2103.15691); ``s4nd`` with three axes.
"""

from __future__ import annotations

from typing import Any

from mmlong.modalities.contract import register_modality
from mmlong.modalities.image import ImageModality


@register_modality("video")
class VideoModality(ImageModality):
    """Pixels of frames in sequence.

    Args:
        dim: width D.
        size: ``[F, H, W]``, frames, height and width.
        channels: numbers of a pixel, 1 (grey) or 3 (RGB).
        order: scan order of the three axes, see :func:`mmlong.layout.scan_order`.
        bands: octaves of the Fourier position features.
    """

    kind = "video"
    thing = "a video"
    axes = ("F", "H", "W")

    def __init__(
        self, dim: int, size: list[int] | tuple[int, ...], channels: int = 1, order: str = "raster", bands: int = 6
    ) -> None:
        super().__init__(dim, size, channels, order, bands)

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Grey and colour, odd sizes, one pixel, and each kind of order."""
        return [
            {"size": [3, 5, 2], "channels": 1, "order": "hilbert"},
            {"size": [2, 3, 4], "channels": 3, "order": "morton"},
            {"size": [4, 2, 2], "channels": 1, "order": "raster"},
            {"size": [1, 1, 1], "channels": 3, "order": "serpentine"},
        ]

"""Images as sequences of palette colours: one token a pixel, K codes, as iGPT (Chen et al. 2020, "Generative Pretraining from Pixels") has them.

The palette is found by k-means over the colours of training images (iGPT: K = 512). Encoding takes the nearest colour of the palette, decoding gives that colour:
a picture loses what the palette does not hold, so bits a token are no density of the picture, and compare only under one palette.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import looks, register_modality
from mmlong.modalities.pixels import PixelModality

SAMPLE = 1 << 16
"""k-means sees at most so many pixels."""

ROWS = 1 << 13
"""Pixels compared with the palette at a time, so that the distances take little memory."""


def nearest_colour(pixels: Tensor, palette: Tensor) -> Tensor:
    """Index of the nearest colour, the first of equals.

    Args:
        pixels: uint8 or float ``(N, C)``, in 0..255.
        palette: ``(K, C)``, likewise.

    Returns:
        int64 ``(N,)``.
    """
    colours = palette.float()
    # |p - c|^2 without |p|^2, which is the same for all colours; integers below 2^24 are exact in float32.
    half = colours.square().sum(1) / 2
    together = pixels.split(ROWS) if looks() else [pixels]  # an exported program does not know how many there are
    parts = [(half - part.float() @ colours.T).argmin(1) for part in together]
    return torch.cat(parts) if parts else pixels.new_zeros(0, dtype=torch.int64)


def fit_palette(images: Tensor, colours: int, seed: int = 0, rounds: int = 25) -> Tensor:
    """A palette by k-means (Lloyd's, started by k-means++; Arthur & Vassilvitskii 2007).

    Args:
        images: uint8 ``(N, C, H, W)``; at most ``SAMPLE`` of their pixels are used.
        colours: K.
        seed: draws those pixels and the start.
        rounds: at most so many steps; fewer if nothing moves.

    Returns:
        uint8 ``(K, C)``, K different colours in ascending order.

    Raises:
        TypeError: not uint8.
        ValueError: another shape, or fewer different colours than ``colours``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"a palette is fitted to uint8 images (N, C, H, W), got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"a palette is fitted to uint8 images (N, C, H, W), got {tuple(images.shape)}")
    draw = torch.Generator().manual_seed(seed)
    pixels = images.cpu().transpose(0, 1).flatten(1).T
    if len(pixels) > SAMPLE:
        pixels = pixels[torch.randint(len(pixels), (SAMPLE,), generator=draw)]
    seen, counts = pixels.unique(dim=0, return_counts=True)
    if len(seen) < colours:
        raise ValueError(f"a palette of {colours} colours needs as many different ones; these images hold {len(seen)}")
    points, weights = seen.double(), counts.double()
    centres = points[torch.multinomial(weights, 1, generator=draw)]
    distance = (points - centres).square().sum(1)
    while len(centres) < colours:
        new = points[torch.multinomial(weights * distance, 1, generator=draw)]
        centres = torch.cat([centres, new])
        distance = torch.minimum(distance, (points - new).square().sum(1))
    for _ in range(rounds):
        nearest = nearest_colour(points, centres)
        total = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        share = torch.zeros(colours, dtype=torch.float64).index_add_(0, nearest, weights)
        moved = torch.where(share[:, None] > 0, total / share[:, None].clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    found = centres.round().to(torch.uint8).unique(dim=0)
    while len(found) < colours:  # some centres rounded to one colour: the worst served colours take their places
        apart = (points - found[nearest_colour(points, found)]).square().sum(1)
        found = torch.cat([found, seen[apart.argmax()][None]])
    return found.unique(dim=0)


@register_modality("image_palette")
class ImagePaletteModality(PixelModality):
    """Pixels in sequence, each the number of a colour.

    The palette is a buffer, so it is in the checkpoint. Given as a number, it is empty until :meth:`initialise` has seen images (a task shows it some of the training data
    before its first step) or weights are loaded; encoding and decoding raise until then.

    Args:
        dim, size, channels, order, bands: see :class:`~mmlong.modalities.pixels.PixelModality`.
        palette: K, or the colours themselves: K lists of ``channels`` numbers in 0..255.

    Raises:
        ValueError: a palette of fewer than 2 colours, of other channels, or of numbers outside 0..255.
    """

    palette: Tensor
    fitted: Tensor

    def __init__(
        self,
        dim: int,
        size: list[int] | tuple[int, int],
        channels: int = 3,
        order: str = "raster",
        bands: int = 6,
        palette: int | Sequence[Sequence[int]] = 512,
    ) -> None:
        super().__init__(dim, size, channels, order, bands)
        given = not isinstance(palette, int)
        rows = [list(colour) for colour in palette] if not isinstance(palette, int) else [[0] * channels] * palette
        if len(rows) < 2:
            raise ValueError(f"a palette has at least 2 colours, got {len(rows)}")
        if any(len(row) != channels or not all(0 <= number <= 255 for number in row) for row in rows):
            raise ValueError(f"a colour of the palette is {channels} whole numbers in 0..255")
        self.codes = len(rows)
        self.register_buffer("palette", torch.tensor(rows, dtype=torch.uint8))
        self.register_buffer("fitted", torch.tensor(given))
        self.code = nn.Embedding(self.codes, dim)

    @property
    def initialised(self) -> bool:
        """Whether the palette is there."""
        return not looks() or bool(self.fitted)

    def initialise(self, raw: Tensor, seed: int = 0) -> None:
        """Fit the palette to images uint8 ``(N, C, H, W)``, unless it is there already; see :func:`fit_palette`."""
        if not self.initialised:
            self.unroll(raw[:1], None, None)
            self.palette.copy_(fit_palette(raw, len(self.palette), seed))
            self.fitted.fill_(True)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, C, H, W)`` to int64 codes ``(B, H * W)`` of the nearest colours, and the grid.

        Raises:
            TypeError, ValueError: see :meth:`~mmlong.modalities.pixels.PixelModality.unroll`.
            RuntimeError: the palette is empty.
        """
        pixels = self.unroll(raw, lengths, resets)
        codes = nearest_colour(pixels.flatten(0, 1), self._colours()).view(pixels.shape[:2])
        return codes, Layout(grid=self.size, order=self.order)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Codes ``(B, H * W)`` to uint8 ``(B, C, H, W)``, the palette's colours.

        Raises:
            ValueError: a code that the palette does not have, or not the pixels of one whole image a row.
            RuntimeError: the palette is empty.
        """
        self.check_codes(tokens)
        return self.roll(self._colours()[tokens])

    def _colours(self) -> Tensor:
        if not self.initialised:
            raise RuntimeError(
                f"this palette of {len(self.palette)} colours is still empty: call initialise(images) once before training, load "
                "weights, or give the colours themselves"
            )
        return self.palette

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``."""
        return self.code(tokens)

    def quantisation(self, raw: Tensor) -> Tensor:
        """The distance of each pixel from the nearest colour of the palette."""
        pixels = raw.movedim(1, -1)
        apart = torch.cdist(pixels.flatten(0, -2).double(), self._colours().double()).amin(1)
        return apart.view(pixels.shape[:-1]).unsqueeze(1)

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Grey and colour, with colours given and fitted."""
        colours = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [10, 200, 30], [11, 200, 30]]
        return [
            {"size": [5, 7], "channels": 3, "order": "serpentine", "palette": colours},
            {"size": [4, 6], "channels": 1, "order": "morton", "palette": [[0], [100], [255]]},
            {"size": [6, 3], "channels": 3, "order": "block_raster:2", "palette": 16},
        ]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, None, None]:
        """Noise of the image's own size; a palette that is still empty is fitted to other noise."""
        if not self.initialised:
            self.initialise(
                torch.randint(256, (8, *self.image), generator=generator, dtype=torch.uint8).to(self.palette.device)
            )
        return super().example(batch, length, generator)

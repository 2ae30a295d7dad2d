"""Point clouds as sequences: a token is one point, its coordinates and whatever else is known of it.

A cloud is a set. Its points come to the model in an order that they decide themselves: that of the Hilbert curve (or the Z curve) through a cube of fine cells, so that neighbours in the sequence are neighbours in space
(as PointMamba, Liang et al. 2024, arXiv 2402.10739, and Point Transformer V3, Wu et al. 2023, arXiv 2312.10035, serialise clouds). Points in one cell come by their numbers; equal points are alike. So the order in which a cloud is given changes nothing, to the bit.

The coordinates are in ``Layout.positions`` too, for whatever reads where tokens stand. The cube is declared, not measured: a point that is added or left out moves no other one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout, hilbert_code, morton_code
from mmlong.modalities.contract import Modality, looks, register_modality, row_layout
from mmlong.modalities.pixels import fourier_features

CURVES = {"hilbert": hilbert_code, "z": lambda cells, bits: morton_code(cells)}
BITS = 10
"""Of a cell's coordinate: 1,024 cells along the cube's side."""


@register_modality("points")
class PointsModality(Modality):
    """Points in the order of a curve through space.

    Args:
        dim: width D.
        axes: coordinates of a point, 2 or 3 as a rule.
        features: further numbers of a point (colour, intensity).
        extent: half the side of the cube around the origin in which clouds lie; points outside are legal, and stand at its edge in the order.
        curve: ``hilbert`` or ``z``.
        bands: octaves of the Fourier features by which coordinates are told, beside the coordinates themselves.
    """

    kind = "points"
    unit = "point"
    unordered = True

    def __init__(
        self, dim: int, axes: int = 3, features: int = 0, extent: float = 1.0, curve: str = "hilbert", bands: int = 6
    ) -> None:
        super().__init__(dim)
        if not 1 <= axes <= 6 or features < 0 or extent <= 0:
            raise ValueError(
                f"points have 1 to 6 axes, 0 or more features, a positive extent; got {axes}, {features}, {extent}"
            )
        if curve not in CURVES:
            raise ValueError(f"curve is {curve!r}; it can be {' or '.join(CURVES)}")
        self.axes, self.channels = axes, axes + features
        self.extent, self.curve, self.bands = extent, curve, bands
        self.point = nn.Linear(self.channels + 2 * bands * axes, dim)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """float32 ``(B, axes + features, N)``, points in any order, to float32 ``(B, N, axes + features)`` in the curve's, with ``positions`` ``(B, N, axes)``; 0 past a row's length.

        Raises:
            TypeError: not float32.
            ValueError: another shape, numbers that are not finite, lengths that do not fit, or resets: a cloud is a row of its own.
        """
        if raw.dtype != torch.float32:
            raise TypeError(f"points are float32 (B, {self.channels}, N), got {raw.dtype}")
        if raw.ndim != 3 or raw.shape[1] != self.channels or raw.shape[2] < 1:
            raise ValueError(f"this model reads points (B, {self.channels}, N), N >= 1, got {tuple(raw.shape)}")
        if resets is not None:
            raise ValueError("a point cloud is a row of its own: it takes no resets")
        _, valid = row_layout(raw.shape[0], raw.shape[2], lengths)
        points = (raw if valid is None else torch.where(valid[:, None], raw, 0)).transpose(1, 2)
        if looks() and not bool(points.isfinite().all()):
            raise ValueError("a point has a number that is NaN or infinite")
        points = points.gather(1, self._order(points, valid)[..., None].expand_as(points))
        return points, Layout(lengths=lengths, positions=points[..., : self.axes])

    def _order(self, points: Tensor, valid: Tensor | None) -> Tensor:
        """int64 ``(B, N)``: by the curve, then by their numbers; padding last."""
        side = 1 << BITS
        cells = ((points[..., : self.axes] / self.extent + 1) * (side / 2)).floor().clamp(0, side - 1).long()
        keys = [*reversed(points.unbind(-1)), CURVES[self.curve](cells, BITS)]
        keys += [] if valid is None else [~valid]
        order = torch.arange(points.shape[1], device=points.device).expand(points.shape[:2])
        for key in keys:  # from the last to the first: each sort leaves equal ones as they are
            order = order.gather(1, torch.argsort(key.gather(1, order), dim=1, stable=True))
        return order

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, N, axes + features)`` back to float32 ``(B, axes + features, N)``, in the order of the tokens."""
        return tokens.float().transpose(1, 2).contiguous()

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, D)``: the numbers, and Fourier features of the coordinates, projected."""
        unit = (tokens[..., : self.axes] / self.extent + 1) / 2
        waves = fourier_features(unit, (2,) * self.axes, self.bands)
        return self.point(torch.cat([tokens, waves], dim=-1).to(self.point.weight.dtype))

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Space and plane, with and without features, both curves."""
        return [{}, {"axes": 2, "features": 1, "curve": "z"}, {"axes": 3, "features": 3, "extent": 0.5, "bands": 0}]

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
        """Points on a coarse lattice, so that some share a cell, a few beyond the cube."""
        raw = (torch.randn(batch, self.channels, length, generator=generator) * 8).round() / 16
        return raw, torch.randint(1, length + 1, (batch,), generator=generator), None

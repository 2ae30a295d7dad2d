"""Images as sequences of patches, each read by a network of timm by itself.

A uint8 image ``(B, C, H, W)`` becomes ``H W / P^2`` tokens of ``C P^2`` real values in [-1, 1], patches of side ``P`` in a scan order; :meth:`TimmPatchesModality.decode` is the exact inverse. A token's vector is what a network of timm,
without its classifier, makes of that patch, projected: any of its networks is a stem, as the convolution of a Vision Transformer's patches is one, but deeper.

A network sees one patch and no more, so that a token's value knows that token alone, as the contract asks. A feature map of the whole picture, whose cells know what is about them, is a part of the backbone:
:mod:`mmlong.backbone.timm_map`. In training, norms over a batch (BatchNorm) are over patches; since these would tell of tokens to come, ``levels`` is not stated, and so there is no autoregressive model of patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities.contract import register_modality
from mmlong.modalities.pixels import PixelModality
from mmlong.timm_net import create_timm


@register_modality("timm_patches")
class TimmPatchesModality(PixelModality):
    """Patches in sequence, each through a network.

    Args:
        dim: width D.
        size: ``[H, W]``, multiples of ``patch``.
        model: the network's name in timm, e.g. ``resnet10t``.
        patch: side P.
        channels: numbers of a pixel, 1 (grey) or 3 (RGB).
        order: scan order of the patches, see :func:`mmlong.layout.scan_order`.
        bands: octaves of the Fourier position features.
        pretrained: load timm's weights, which takes a network; the first layer is adapted to the channels.
        options: of the network; one that is made for one size is told ``{img_size: P}``.

    Raises:
        ValueError: an unknown network, or sides that patches do not fill.
    """

    unit = "patch"

    def __init__(
        self,
        dim: int,
        size: list[int] | tuple[int, int],
        model: str,
        patch: int = 32,
        channels: int = 3,
        order: str = "raster",
        bands: int = 6,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if patch < 1 or len(size) != 2 or any(n % patch for n in size):
            raise ValueError(f"patches of side {patch} do not fill an image of [H, W] = {list(size)}")
        super().__init__(dim, [n // patch for n in size], channels * patch**2, order, bands)
        self.image = (channels, int(size[0]), int(size[1]))
        self.channels, self.patch = channels * patch**2, patch
        net = create_timm(model, pretrained=pretrained, num_classes=0, in_chans=channels, **(options or {}))
        self.net = net
        self.project = nn.Linear(int(net.head_hidden_size), dim)

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """uint8 ``(B, C, H, W)`` to float ``(B, H W / P^2, C P^2)`` in [-1, 1], and the grid of patches.

        Raises:
            TypeError, ValueError: see :meth:`~mmlong.modalities.pixels.PixelModality.unroll`.
        """
        patches = self.unroll(raw, lengths, resets)
        return patches.float() / 127.5 - 1, Layout(grid=self.size, order=self.order)

    def unroll(self, raw: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Tensor:
        """uint8 ``(B, C, H, W)`` to uint8 ``(B, H W / P^2, C P^2)``, patches in scan order; raises as pixels do."""
        self.check_image(raw, lengths, resets)
        return F.pixel_unshuffle(raw, self.patch).flatten(2)[:, :, self.order_index].transpose(1, 2)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """float ``(B, H W / P^2, C P^2)`` back to uint8 ``(B, C, H, W)``, rounded and clamped.

        Raises:
            ValueError: not the patches of one whole image a row.
        """
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.pixels, self.channels):
            raise ValueError(
                f"an image is decoded from its {self.pixels} patches of {self.channels} numbers each, got tokens for {tuple(tokens.shape)}"
            )
        patches = ((tokens.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        grid = patches.transpose(1, 2)[:, :, self.inverse_index].unflatten(2, self.size)
        return F.pixel_shuffle(grid, self.patch)

    def values(self, tokens: Tensor) -> Tensor:
        """``(B, L, C P^2)`` to ``(B, L, D)``."""
        batch, length, _ = tokens.shape
        patches = tokens.to(self.project.weight.dtype).reshape(batch * length, self.image[0], self.patch, self.patch)
        return self.project(self.net(patches)).unflatten(0, (batch, length))

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """A convolutional network and one made for one size."""
        return [
            {"size": [16, 24], "model": "test_resnet", "patch": 8, "order": "serpentine"},
            {
                "size": [8, 4],
                "model": "test_vit",
                "patch": 4,
                "channels": 1,
                "options": {"img_size": 4, "patch_size": 2},
            },
        ]

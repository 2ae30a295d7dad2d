"""A network of timm over the whole picture: its feature map, given to the tokens that stand there.

    y_t = x_t + W m_{c(t)},        m = net(x on its grid),        c(t) the cell of the coarser map in which token t lies

so that ``{timm: resnet10t}`` at the head of ``backbone.parts`` is a stem of any of timm's networks before mixers that see every pixel. The network takes the tokens' D channels for an image's (``in_chans``), in raster order
whatever the scan order; ``W`` starts as zero, so that the part starts as nothing.

Why a part, and no modality: a modality's value of a token knows that token alone (an autoregressive model moves it by one, a masked model hides it), and a cell of a feature map knows the pixels about it. As a part it says that it sees both
sides, and models that must not refuse it. What a network makes of one patch by itself is a modality, :mod:`mmlong.modalities.timm_patches`. In training, norms over a batch (BatchNorm) make rows depend on each other, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone.part import register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.ops.raster import raster_of
from mmlong.timm_net import create_timm


@register_part("timm")
class TimmMap(nn.Module):
    """The feature map of a network of timm, beside the tokens.

    Args:
        model: its name in timm, e.g. ``resnet10t``; one that gives feature maps (``features_only``).
        dim: width D.
        stage: which of its maps, as in timm's ``out_indices``; -1: the coarsest.
        pretrained: load timm's weights, which takes a network; the first layer is adapted to D channels.
        options: of the network.

    Raises:
        ValueError: an unknown network.
    """

    causal = False
    streaming = False

    def __init__(
        self, model: str, dim: int, stage: int = -1, pretrained: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.name, self.dim = model, dim
        net = create_timm(
            model, pretrained=pretrained, features_only=True, out_indices=(stage,), in_chans=dim, **(options or {})
        )
        self.net = net
        self.last = "NHWC" in str(getattr(net, "output_fmt", "NCHW"))
        self.lift = nn.Linear(net.feature_info.channels()[-1], dim)
        nn.init.zeros_(self.lift.weight)
        nn.init.zeros_(self.lift.bias)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` on a grid of two axes to the same, and no state.

        Raises:
            ValueError: a state, padded rows, several documents, or no grid of two axes.
        """
        if state is not None:
            raise ValueError(f"timm's {self.name} was given a state but has none: it sees both sides")
        if layout is None or (layout.grid is None and layout.positions is None):
            raise ValueError(f"timm's {self.name} reads pictures, and these tokens are on no grid (layout.grid)")
        if layout.lengths is not None or layout.resets is not None:
            raise ValueError(f"timm's {self.name} reads one whole picture a row: no padded rows, no several documents")
        raster = raster_of(layout, x.shape[1], 2, f"timm's {self.name}")
        height, width = raster.grid
        found = self.net(raster.lay(x).transpose(1, 2).unflatten(2, (height, width)))[-1]
        if not self.last:
            found = found.permute(0, 2, 3, 1)
        rows = torch.arange(height, device=x.device) * found.shape[1] // height
        columns = torch.arange(width, device=x.device) * found.shape[2] // width
        y = self.lift(found)[:, rows][:, :, columns].flatten(1, 2)
        return x + raster.unroll(y), None

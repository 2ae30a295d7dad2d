"""Linear prediction: the part of the next token that is a fixed linear function of some earlier ones.

    c_t = sum over o in offsets of A_o x_{t - o}

Audio coders (LPC) and lossless image coders (Paeth's and its kin in PNG) live on it. Here it is learned with everything else and moves the means of a mixture of logistics, so that the network has to find only what is
left: features behind a normalisation know the size of a number roughly, this knows it exactly. An offset of 1 is the token before; on a raster of width W, ``[1, W, W + 1, W - 1]`` are the pixels to the left, above,
above left and above right. At the start the first offset is handed on and the others are nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearPrediction(nn.Module):
    """A causal linear map of earlier real tokens.

    Args:
        channels: C, numbers in a token.
        offsets: how many tokens back, each at least 1, none twice.

    Attributes:
        reach: tokens that must be kept.
    """

    def __init__(self, channels: int, offsets: Sequence[int]) -> None:
        super().__init__()
        if not offsets or min(offsets) < 1 or len(set(offsets)) != len(offsets):
            raise ValueError(f"linear_prediction takes offsets of at least 1, none twice; got {list(offsets)}")
        self.offsets = [int(offset) for offset in offsets]
        self.reach = max(self.offsets)
        self.weight = nn.Parameter(torch.zeros(len(self.offsets), channels, channels))
        with torch.no_grad():
            self.weight[0] = torch.eye(channels)

    def forward(self, before: Tensor, length: int, index: Tensor) -> Tensor:
        """The prediction at ``length`` positions.

        Args:
            before: ``(B, reach + length - 1, C)``: the last ``reach`` tokens before the first position, and the tokens up to the last but one.
            length: L.
            index: ``(B or 1, L)``, how many tokens of its document come before each position; further back is nothing.

        Returns:
            ``(B, L, C)``.
        """
        total: Tensor | None = None
        for offset, weight in zip(self.offsets, self.weight, strict=True):
            start = self.reach - offset
            known = (index >= offset)[..., None].to(before.dtype)
            found = (before[:, start : start + length] * known) @ weight.to(before.dtype).T
            total = found if total is None else total + found
        assert total is not None
        return total

"""Linear prediction: the part of the next token that is a fixed linear function of some earlier ones.

    c_t = sum over o in offsets of A_o x_{t - o}

Audio coders (LPC) and lossless image coders (Paeth's and its kin in PNG) live on it. Here it is learned with everything else and moves the means of a mixture of logistics, so that the network has to find only what is
left: features behind a normalisation know the size of a number roughly, this knows it exactly. An offset of 1 is the token before; on a raster of width W, ``[1, W, W + 1, W - 1]`` are the pixels to the left, above,
above left and above right. At the start the first offset is handed on and the others are nothing.

One function for all places is a compromise where there are kinds of places: in a film what stands still is the pixel of the frame before, what moves is another of it, and in the first frame there is none. So each of a mixture's K components can have a function of its own, ``c_t^k``, and the network says by the
components' weights which one fits, as in coders that blend predictors (TMW: Meyer & Tischer 1997, "TMW: a new method for lossless image compression"). They begin differently: the k-th hands on the k-th offset, in turn.
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
        functions: K, how many there are; ``None``: one, for all components.

    Attributes:
        reach: tokens that must be kept.
    """

    def __init__(self, channels: int, offsets: Sequence[int], functions: int | None = None) -> None:
        super().__init__()
        if not offsets or min(offsets) < 1 or len(set(offsets)) != len(offsets):
            raise ValueError(f"linear_prediction takes offsets of at least 1, none twice; got {list(offsets)}")
        self.offsets = [int(offset) for offset in offsets]
        self.reach = max(self.offsets)
        self.functions = functions
        shape = (channels, channels) if functions is None else (channels, functions, channels)
        self.weight = nn.Parameter(torch.zeros(len(self.offsets), *shape))
        with torch.no_grad():
            if functions is None:
                self.weight[0] = torch.eye(channels)
            else:
                for k in range(functions):
                    self.weight[k % len(self.offsets), :, k] = torch.eye(channels)

    def forward(self, before: Tensor, length: int, index: Tensor) -> Tensor:
        """The prediction at ``length`` positions.

        Args:
            before: ``(B, reach + length - 1, C)``: the last ``reach`` tokens before the first position, and the tokens up to the last but one.
            length: L.
            index: ``(B or 1, L)``, how many tokens of its document come before each position; further back is nothing.

        Returns:
            ``(B, L, C)``, or ``(B, L, C, K)`` of K functions.
        """
        total: Tensor | None = None
        for offset, weight in zip(self.offsets, self.weight.flatten(1, -2), strict=True):
            start = self.reach - offset
            known = (index >= offset)[..., None].to(before.dtype)
            found = (before[:, start : start + length] * known) @ weight.to(before.dtype).T
            total = found if total is None else total + found
        assert total is not None
        return total if self.functions is None else total.unflatten(-1, (-1, self.functions))

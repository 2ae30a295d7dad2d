"""Norms by name: what brings tokens to one size before a branch reads them.

Three of them, each over the channels of one token::

    layer         (x - mean) / sqrt(variance + eps) * weight + bias       Ba et al. 2016, arXiv 1607.06450
    rms           x / sqrt(mean(x^2) + eps) * weight                      Zhang & Sennrich 2019, arXiv 1910.07467
    rms_offset    the same with 1 + weight, which starts at 0 and is what weight decay draws to 0: Gemma's
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.registry import Registry

NORMS: Registry[type[nn.Module]] = Registry("norm")

NORMS.register("layer")(nn.LayerNorm)
NORMS.register("rms")(nn.RMSNorm)


@NORMS.register("rms_offset")
class OffsetRMSNorm(nn.Module):
    """RMSNorm whose weight is kept as its distance from 1.

    Args:
        dim: width D.
        eps: under the root.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def create_norm(name: str, dim: int, eps: float) -> nn.Module:
    """A norm by name; an unknown name is answered with the nearest."""
    made: nn.Module = NORMS[name](dim, eps=eps)  # type: ignore[call-arg]
    return made

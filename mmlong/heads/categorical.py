"""A distribution over ``num_classes`` codes at every position: bytes, nucleotides, mu-law levels, sub-pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import Head, register_head, summed
from mmlong.heads.sampling import Sampling, draw_codes
from mmlong.layout import Layout


@register_head("categorical")
class CategoricalHead(Head):
    """Logits at every position.

    Args:
        dim: width of the features.
        num_classes: how many codes.
    """

    per_token = True

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to logits ``(B, L, num_classes)``."""
        return self.linear(x)

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with codes ``(B, L)`` summed over valid positions, and how many those are."""
        loss = F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        return summed(loss, None if layout is None else layout.valid(target.shape[1]))

    def sample(
        self, prediction: Tensor, sampling: Sampling | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes ``(B, L)`` drawn from logits ``(B, L, num_classes)``."""
        return draw_codes(prediction, sampling or Sampling(), generator)

"""The projection head of contrastive learning: pool, then a small network whose output is compared and, after training, thrown away (SimCLR, Chen et al. 2020, arXiv 2002.05709).

What the head pools is the embedding (``pooled``, ``model.forward_head(x, layout, pre_logits=True)``); what it predicts is only for the loss, and keeps less of the
input than the embedding does (their figure 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmlong.heads.contract import register_head
from mmlong.heads.pooled import PooledHead
from mmlong.layout import Layout


@register_head("project")
class ProjectHead(PooledHead):
    """Pooled features through one hidden layer.

    Args:
        dim: width of the features; the hidden layer is as wide as what is pooled.
        num_classes: numbers to compare (timm's word for the outputs of a head).
        pool, dropout: see :class:`~mmlong.heads.pooled.PooledHead`.
    """

    def __init__(
        self, dim: int, num_classes: int = 128, pool: str | Mapping[str, Any] = "mean", dropout: float = 0.0
    ) -> None:
        super().__init__(dim, num_classes, pool, dropout)
        width = getattr(self.pool, "width", dim)
        self.hidden = nn.Linear(width, width)
        self.activation = nn.GELU()

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, num_classes)``."""
        return self.linear(self.dropout(self.activation(self.hidden(self.pooled(x, layout)))))

"""Classification of a whole sequence: pool the valid positions, then a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import Head, register_head
from mmlong.layout import Layout

POOLS = ("mean", "last", "max")


@register_head("classify")
class ClassifyHead(Head):
    """Pooled logits.

    Args:
        dim: width of the features.
        num_classes: how many classes; 0 gives the pooled features themselves.
        pool: ``mean`` or ``max`` over valid positions, or the ``last`` valid position (for causal models).
        dropout: before the linear layer.
    """

    def __init__(self, dim: int, num_classes: int = 0, pool: str = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"unknown pooling {pool!r}; known: {', '.join(POOLS)}")
        self.pool = pool
        self.num_classes = num_classes
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def pooled(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, D)`` over each row's valid positions."""
        valid = None if layout is None else layout.valid(x.shape[1])
        if self.pool == "last":
            if layout is None or layout.lengths is None:
                return x[:, -1]
            return x[torch.arange(x.shape[0], device=x.device), (layout.lengths - 1).clamp_min(0)]
        if valid is None:
            return x.mean(1) if self.pool == "mean" else x.amax(1)
        if self.pool == "max":
            return torch.where(valid[..., None], x, float("-inf")).amax(1)
        return torch.where(valid[..., None], x, 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to logits ``(B, num_classes)``."""
        return self.linear(self.dropout(self.pooled(x, layout)))

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with class indices ``(B,)``, summed, and B."""
        count = torch.tensor(float(target.shape[0]), device=target.device)
        return F.cross_entropy(prediction.float(), target, reduction="sum"), count

"""What heads with one prediction a sequence share: pool the valid positions, then a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmlong.heads.contract import Head
from mmlong.heads.pooling import create_pool
from mmlong.layout import Layout


class PooledHead(Head):
    """Base of the heads that pool.

    Args:
        dim: width of the features.
        num_classes: how many numbers to predict (timm's word for them, classes or not); 0 gives the pooled features themselves.
        pool: over valid positions, a name or a name and options; see :mod:`mmlong.heads.pooling`.
        dropout: before the linear layer.
    """

    def __init__(
        self, dim: int, num_classes: int = 0, pool: str | Mapping[str, Any] = "mean", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pool = create_pool(pool, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(getattr(self.pool, "width", dim), num_classes) if num_classes else nn.Identity()

    def pooled(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, D)``, or as wide as the pooling makes it, over each row's valid positions."""
        return self.pool(x, layout)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, num_classes)``."""
        return self.linear(self.dropout(self.pooled(x, layout)))

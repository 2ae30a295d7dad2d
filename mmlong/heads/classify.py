"""Classification of a whole sequence: pool the valid positions, then a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.heads.contract import register_head
from mmlong.heads.pooled import PooledHead
from mmlong.layout import Layout


@register_head("classify")
class ClassifyHead(PooledHead):
    """Pooled logits of one class among several.

    Args:
        dim: width of the features.
        num_classes: how many classes; 0 gives the pooled features themselves.
        pool, dropout: see :class:`~mmlong.heads.pooled.PooledHead`.
    """

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with class indices ``(B,)``, summed, and B."""
        count = torch.tensor(float(target.shape[0]), device=target.device)
        return F.cross_entropy(prediction.float(), target, reduction="sum"), count

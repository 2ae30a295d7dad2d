"""Several labels of a whole sequence at once, each there or not: pool, a linear layer, and a yes or no for every label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.heads.contract import register_head, same_shape
from mmlong.heads.pooled import PooledHead
from mmlong.layout import Layout


@register_head("multilabel")
class MultiLabelHead(PooledHead):
    """Pooled logits, one a label.

    Args:
        dim: width of the features.
        num_classes: how many labels.
        pool, dropout: see :class:`~mmlong.heads.pooled.PooledHead`.
    """

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy with ``(B, num_classes)`` of 0 and 1 (or shares between), summed over labels, and how many there are.

        Raises:
            ValueError: a target of another shape, e.g. class numbers.
        """
        same_shape(prediction, target, "multilabel")
        each = F.binary_cross_entropy_with_logits(prediction, target.to(prediction.dtype), reduction="sum")
        return each, torch.tensor(float(target.numel()), device=target.device)

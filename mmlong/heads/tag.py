"""Tagging: a label at every position, where there is one: exons, phonemes, the object a pixel belongs to."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmlong.heads.categorical import CategoricalHead
from mmlong.heads.contract import register_head, same_shape, summed
from mmlong.layout import Layout


@register_head("tag")
class TagHead(CategoricalHead):
    """Logits of a label at every position.

    Args:
        dim: width of the features.
        num_classes: how many labels.
        ignored: a target of this number is no label and counts for nothing.
    """

    def __init__(self, dim: int, num_classes: int, ignored: int = -100) -> None:
        super().__init__(dim, num_classes)
        self.ignored = ignored

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with labels ``(B, L)`` summed over valid positions that have one, and how many those are.

        Raises:
            ValueError: a target of another shape, as when the backbone pools and labels do not.
        """
        same_shape(prediction[..., 0], target, "tag")
        logits, labels = prediction.flatten(0, 1), target.flatten()
        each = F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none").view(target.shape)
        counted = target != self.ignored
        valid = None if layout is None else layout.valid(target.shape[1])
        return summed(each, counted if valid is None else counted & valid)

"""Regression: numbers of a whole sequence (``regress``) or at every position (``regress_tokens``).

Errors are squared, absolute, or Huber's (1964): squared up to ``delta`` and absolute beyond, ``delta (|e| - delta / 2)``, as torch has it. They are in the units of the
target, not in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import Head, register_head, same_shape, summed
from mmlong.heads.pooled import PooledHead
from mmlong.layout import Layout

ERRORS = ("mse", "l1", "huber")


def check_error(error: str, delta: float) -> None:
    """Raise ``ValueError`` for an unknown error, or a ``delta`` that is not above 0."""
    if error not in ERRORS:
        raise ValueError(f"unknown error {error!r}; known: {', '.join(ERRORS)}")
    if not delta > 0:
        raise ValueError(f"delta of the Huber error must be above 0, got {delta}")


def errors(prediction: Tensor, target: Tensor, error: str, delta: float) -> Tensor:
    """Each number's error, of the shape of both."""
    target = target.to(prediction.dtype)
    if error == "mse":
        return F.mse_loss(prediction, target, reduction="none")
    if error == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    return F.huber_loss(prediction, target, delta=delta, reduction="none")


@register_head("regress")
class RegressHead(PooledHead):
    """Numbers of the whole sequence.

    Args:
        dim: width of the features.
        num_classes: how many numbers (timm's word for the outputs of a head).
        pool, dropout: see :class:`~mmlong.heads.pooled.PooledHead`.
        error: ``mse``, ``l1`` or ``huber``.
        delta: where Huber's error goes from squared to absolute.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 1,
        pool: str | Mapping[str, Any] = "mean",
        dropout: float = 0.0,
        error: str = "mse",
        delta: float = 1.0,
    ) -> None:
        super().__init__(dim, num_classes, pool, dropout)
        check_error(error, delta)
        self.error, self.delta = error, delta

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Errors against ``(B, num_classes)``, summed, and how many there are.

        Raises:
            ValueError: a target of another shape.
        """
        same_shape(prediction, target, "regress")
        each = errors(prediction, target, self.error, self.delta)
        return each.sum(), torch.tensor(float(target.numel()), device=target.device)


@register_head("regress_tokens")
class RegressTokensHead(Head):
    """Numbers at every position.

    Args:
        dim: width of the features.
        num_classes: how many numbers at each.
        error, delta: see :class:`RegressHead`.
    """

    per_token = True

    def __init__(self, dim: int, num_classes: int = 1, error: str = "mse", delta: float = 1.0) -> None:
        super().__init__()
        check_error(error, delta)
        self.num_classes = num_classes
        self.error, self.delta = error, delta
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, num_classes)``."""
        return self.linear(x)

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Errors against ``(B, L, num_classes)``, summed over valid positions, and how many numbers those hold.

        Raises:
            ValueError: a target of another shape.
        """
        same_shape(prediction, target, "regress_tokens")
        each = errors(prediction, target, self.error, self.delta)
        return summed(each, None if layout is None else layout.valid(target.shape[1]))

"""The contract of a head: features ``(B, L, D)`` to a prediction and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.heads.sampling import Sampling
from mmlong.layout import Layout
from mmlong.registry import Registry


class Head(nn.Module):
    """Base of every head.

    Attributes:
        per_token: whether there is a prediction at every position (and so the loss can be taken segment by segment).
    """

    per_token: bool = False

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Features ``(B, L, D)`` and their layout to a prediction."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, layout)")

    def pooled(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """What the last linear layer sees; the features themselves for a head that does not pool."""
        return x

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """``(sum of losses in nats, number of things predicted)``, so that parts of a batch or sequence can be added up."""
        raise TypeError(f"{type(self).__name__} does not define loss(prediction, target, layout)")

    def sample(
        self, prediction: Tensor, sampling: Sampling | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens drawn from what a ``per_token`` head predicts, as its modality has them."""
        raise TypeError(f"{type(self).__name__} predicts no tokens, so none can be drawn from it")


def summed(each: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(sum, count)`` of what a per-token loss has at every position, over those that count.

    Args:
        each: ``(B, L)`` or ``(B, L, K)``.
        counted: bool ``(B, L)``; ``None``: all.
    """
    if counted is None:
        return each.sum(), torch.tensor(float(each.numel()), device=each.device)
    which = counted.view(*counted.shape, *[1] * (each.ndim - 2)).expand_as(each)
    return torch.where(which, each, 0).sum(), which.sum().to(each.dtype)


def same_shape(prediction: Tensor, target: Tensor, head: str) -> None:
    """Raise ``ValueError`` unless a target has the shape of what it is held against: broadcasting would compare other things in silence."""
    if prediction.shape != target.shape:
        raise ValueError(f"head {head} has targets {tuple(prediction.shape)}, got {tuple(target.shape)}")


HEADS: Registry[type[Head]] = Registry("head", group="mmlong.heads")


def register_head(name: str) -> Callable[[type[Head]], type[Head]]:
    """Class decorator that names a head."""
    return HEADS.register(name)


def create_head(name: str, dim: int, **options: Any) -> Head:
    """A registered head by name for features of width ``dim``."""
    return HEADS.create(name, dim, **options)

"""Tokens moved to other places of a longer sequence of zeros, and back: how documents get room between them.

Definition, for distinct ``places`` of each row: ``spread(x)[places_t] = x_t``, zero elsewhere; ``gather(y)_t = y[places_t]``. Each is the other's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Tokens ``x (B, L, D)`` at int64 ``places (B, L)``, distinct in a row, of ``(B, length, D)``."""
    B, L, D = x.shape
    return _Spread.apply(x.reshape(B * L, D), _rows(places, length), B * length).view(B, length, D)


def gather(y: Tensor, places: Tensor) -> Tensor:
    """The tokens ``(B, L, D)`` at ``places (B, L)`` of ``y (B, length, D)``."""
    (B, length, D), L = y.shape, places.shape[1]
    return _Gather.apply(y.reshape(B * length, D), _rows(places, length)).view(B, L, D)


def _rows(places: Tensor, length: int) -> Tensor:
    return (places + length * torch.arange(places.shape[0], device=places.device)[:, None]).flatten()


class _Spread(torch.autograd.Function):
    """Written out, since autograd's own gradient of the other would add row by row."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return t.new_zeros(size, t.shape[1]).index_copy_(0, places, t)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(dy, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = t.shape[0]
        return t.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(dy, ctx.saved_tensors[0], ctx.size), None

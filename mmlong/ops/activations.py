"""Activations by name, as feed-forwards and gates have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.registry import nearest


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, the GELU of Image GPT and CLIP."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (Primer, So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "silu": F.silu,
}
"""``gelu_tanh`` is the approximation by a tanh that GPT-2 and Gemma have."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name; a ``ValueError`` with the nearest for one that there is not."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]

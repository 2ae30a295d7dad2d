"""Projections whose results decide something: which bucket, which centroid, which block.

A decision is not nearly right in a lower precision, it is another one; so what decides is computed in at least float32, under autocast too, from tokens and weights as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact_linear(proj: nn.Linear, x: Tensor) -> Tensor:
    """``proj(x)`` in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if proj.bias is None else proj.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), proj.weight.to(dtype), bias)

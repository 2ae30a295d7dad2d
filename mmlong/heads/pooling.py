"""Pooling: the features of a sequence ``(B, L, D)`` to one vector a row ``(B, D)``, over its valid positions.

- ``mean``, ``max``: over all of them.
- ``last``: the last one, which in a causal model has seen all the others.
- ``attention``: one learned query looks at all of them, with several heads (Set Transformer's pooling with one seed, Lee et al. 2019; what a class token does in the last layer of CaiT,
  Touvron et al. 2021). It departs from both in having no feed-forward of its own and no output projection: the head's linear layer follows.

A class token that goes through the whole backbone is not among them: it would have to be put into the sequence before the mixers, where it has no cell of the grid,
and a causal mixer shows it either nothing (in front) or what ``last`` sees (behind). ``attention`` reads by a learned query without it.

A row without valid positions is pooled to zeros.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout

POOLS = ("mean", "last", "max", "attention")


class Pool(nn.Module):
    """One of the poolings without parameters.

    Args:
        kind: ``mean``, ``last`` or ``max``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, D)``."""
        lengths = None if layout is None else layout.lengths
        if lengths is None or layout is None:
            return x[:, -1] if self.kind == "last" else x.mean(1) if self.kind == "mean" else x.amax(1)
        if self.kind == "last":
            found = x[torch.arange(x.shape[0], device=x.device), (lengths - 1).clamp_min(0)]
            return torch.where(lengths[:, None] > 0, found, 0)
        valid = layout.valid(x.shape[1])
        assert valid is not None
        if self.kind == "max":
            highest = torch.where(valid[..., None], x, float("-inf")).amax(1)
            return torch.where(lengths[:, None] > 0, highest, 0)
        return torch.where(valid[..., None], x, 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)


class AttentionPool(nn.Module):
    """A learned query over the valid positions.

    Args:
        dim: width D; the number of heads is its largest divisor among 8, 4, 2 and 1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = math.gcd(dim, 8)
        self.query = nn.Parameter(torch.randn(dim))
        self.key = nn.Linear(dim, dim, bias=False)  # the same for all keys, a bias would move no weight
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, D)``."""
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            # Weights of padding are zero, but zero times infinity is not.
            x = torch.where(valid[..., None], x, 0)
        k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.key, self.value))
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(x.shape[0], -1, -1, -1)
        if valid is None:
            return F.scaled_dot_product_attention(q, k, v).flatten(1)
        some = valid.any(1)
        mask = (valid | ~some[:, None])[:, None, None]  # a row with nothing to see must see something to be finite
        return torch.where(some[:, None], F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1), 0)


def create_pool(kind: str, dim: int) -> nn.Module:
    """A pooling by name. Raises ``ValueError`` for an unknown one."""
    if kind not in POOLS:
        raise ValueError(f"unknown pooling {kind!r}; known: {', '.join(POOLS)}")
    return AttentionPool(dim) if kind == "attention" else Pool(kind)

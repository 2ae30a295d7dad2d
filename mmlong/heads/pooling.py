"""Pooling: the features of a sequence ``(B, L, D)`` to one vector a row ``(B, D)``, over its valid positions.

- ``mean``, ``max``: over all of them.
- ``last``: the last one, which in a causal model has seen all the others.
- ``first``: the first one, which in a model of both directions has seen all the others; in a causal one, nothing. For sequences that begin with what decides (a ListOps expression's outermost operator).
- ``pma``: Set Transformer's pooling by multi-head attention (Lee et al. 2019, arXiv 1810.00825): ``k`` learned seeds ``S`` read the positions ``Z``, and each other if there are several, and stand side by side, ``(B, k D)``. What the
  paper calls ``SAB(PMA_k(Z))``, with ``MAB`` as in :mod:`mmlong.mixers.set_transformer` and ``rFF`` a layer and a ReLU; its decoder's last layer is the head's:

      PMA_k(Z) = MAB(S, rFF(Z)),    SAB(X) = MAB(X, X)

- ``attention``: one learned query looks at all of them, with several heads (Set Transformer's pooling with one seed, Lee et al. 2019; what a class token does in the last layer of CaiT,
  Touvron et al. 2021). It departs from both in having no feed-forward of its own and no output projection: the head's linear layer follows.

A class token that goes through the whole backbone is not among them: it would have to be put into the sequence before the mixers, where it has no cell of the grid,
and a causal mixer shows it either nothing (in front) or what ``last`` sees (behind). ``attention`` reads by a learned query without it.

A pooling is named, or written with its options: ``{name: pma, seeds: 4}``.

A row without valid positions is pooled to zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.set_transformer import MAB
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads
from mmlong.registry import nearest

POOLS = ("mean", "first", "last", "max", "attention", "pma")


class Pool(nn.Module):
    """One of the poolings without parameters.

    Args:
        kind: ``mean``, ``first``, ``last`` or ``max``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, D)``."""
        lengths = None if layout is None else layout.lengths
        if lengths is None or layout is None:
            whole = {
                "mean": lambda: x.mean(1),
                "first": lambda: x[:, 0],
                "last": lambda: x[:, -1],
                "max": lambda: x.amax(1),
            }
            return whole[self.kind]()
        if self.kind in ("first", "last"):
            place = (lengths - 1).clamp_min(0) if self.kind == "last" else torch.zeros_like(lengths)
            found = x[torch.arange(x.shape[0], device=x.device), place]
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
        x, valid = _clean(x, layout)
        k, v = (to_heads(f(x), self.heads) for f in (self.key, self.value))
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(x.shape[0], -1, -1, -1)
        return from_heads(cross_attention(q, k, v, valid=valid))[:, 0]


class PMA(nn.Module):
    """Pooling by multi-head attention.

    Args:
        dim: width D.
        seeds: k.
        heads: ``None`` for the largest divisor of D among 8, 4, 2 and 1.

    Raises:
        ValueError: sizes below 1, or heads that do not divide the width.

    Attributes:
        width: of what comes out, ``k D``.
    """

    def __init__(self, dim: int, seeds: int = 1, heads: int | None = None) -> None:
        super().__init__()
        heads = math.gcd(dim, 8) if heads is None else heads
        if seeds < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"pooling pma needs at least 1 seed, and heads that divide its width {dim}; got {seeds} and {heads}"
            )
        self.width = seeds * dim
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(seeds, dim)))
        self.feedforward = nn.Linear(dim, dim)
        self.gather = MAB(dim, dim, heads)
        self.between = MAB(dim, dim, heads) if seeds > 1 else None

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, k D)``."""
        x, valid = _clean(x, layout)
        y = self.gather(self.seeds.expand(x.shape[0], -1, -1), F.relu(self.feedforward(x)), valid)
        if self.between is not None:
            y = self.between(y, y)
        y = y.flatten(1)
        return y if valid is None else torch.where(valid.any(1, keepdim=True), y, 0)


def _clean(x: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with zeros at padding, and where there is none. Weights of padding are zero, but zero times infinity is not."""
    valid = None if layout is None else layout.valid(x.shape[1])
    return (x if valid is None else torch.where(valid[..., None], x, 0)), valid


def create_pool(kind: str | Mapping[str, Any], dim: int) -> nn.Module:
    """A pooling by name, or by ``{"name": ..., **options}``. Raises ``ValueError`` for an unknown one, or options that it does not have."""
    options = {"name": kind} if isinstance(kind, str) else dict(kind)
    name = options.pop("name", None)
    if name not in POOLS:
        raise ValueError(f"unknown pooling {name!r}; known: {', '.join(POOLS)}")
    known = ("seeds", "heads") if name == "pma" else ()
    for option in options:
        if option not in known:
            raise ValueError(f"pooling {name} has no option {option!r}{nearest(option, known)}")
    if name == "pma":
        return PMA(dim, **options)
    return AttentionPool(dim) if name == "attention" else Pool(name)

"""Product-key memory: a feed-forward that looks its answer up, of so many values that each is a token's own.

Follows Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv 1907.05242). There are ``n^2`` values, and the key of value ``(i, j)`` is two halves side by side, ``c_i`` and ``c'_j``, each of ``n``. Of every head ``h``, with a query ``q = norm(W x)`` cut in two,

    s_ij = q_1 . c_i + q_2 . c'_j
    y = sum_h sum_{(i, j) in T_h} softmax(s_ij) v_ij,       T_h the ``k`` largest of all n^2, over which the softmax is

``T_h`` is found among pairs of the ``k`` best of each half, exactly: a pair that is in it has both halves there, and, halves in order, the ``a``-th with the ``b``-th only if ``a b <= k``, since so many are no worse. So a token costs 2 n products a head, and reads ``k`` values a head of as many as there are. Keys and
queries are each head's own, values are shared. Scores are made for some tokens at a time, and again in the backward; what is read is never there one by one (``embedding_bag``).

Departures: queries are normed by a layer norm, each half of a head's by itself, where the paper has a batch norm, which in training would make a token's result depend on later ones, on padding and on how a batch is cut. The gradient of the values is dense, since sparse ones go with few optimisers, and not with clipping
or averaging over ranks; they learn four times as fast as the rest, as in the paper, and without decay, which would wear away what is seldom read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.backbone.feedforward import FFNS

SCORES = 1 << 21
"""Scores of halves that are there at a time."""


@FFNS.register("product_key_memory")
class ProductKeyMemory(nn.Module):
    """A memory of ``keys ** 2`` values.

    Args:
        dim: width D.
        ratio: not looked at: the memory is as large as its keys say.
        keys: n, halves of keys, of each of the two.
        heads: queries of a token.
        topk: k, values that a query reads, at most ``keys``.
        query_dim: channels of a query, even; ``None`` for about ``dim / 2``, as in the paper.

    Raises:
        ValueError: sizes that make no sense.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"values": {"lr_scale": 4.0, "weight_decay": 0.0}}

    def __init__(
        self, dim: int, ratio: float, keys: int = 128, heads: int = 4, topk: int = 32, query_dim: int | None = None
    ) -> None:
        super().__init__()
        query_dim = 2 * max(1, dim // 4) if query_dim is None else query_dim
        if heads < 1 or not 1 <= topk <= keys:
            raise ValueError(
                f"product_key_memory: a query of at least 1 head reads at least 1 value and at most as many as there are halves of keys; got heads {heads} and topk {topk} of {keys} keys"
            )
        if query_dim < 2 or query_dim % 2:
            raise ValueError(f"product_key_memory: query_dim is cut in two, so it must be even, got {query_dim}")
        half = query_dim // 2
        self.heads, self.topk = heads, topk
        self.query = nn.Linear(dim, heads * query_dim)
        self.scale = nn.Parameter(torch.ones(heads, 2, half))
        self.shift = nn.Parameter(torch.zeros(heads, 2, half))
        self.keys = nn.Parameter(torch.empty(heads, 2, keys, half).uniform_(-(half**-0.5), half**-0.5))
        self.values = nn.Parameter(torch.randn(keys**2, dim) * dim**-0.5)
        self.register_buffer("pairs", torch.tensor(candidates(topk)).T.contiguous(), persistent=False)
        self.pairs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        weights, places = self.look_up(x.reshape(-1, x.shape[-1]))
        # The values as they are: of a copy of all of them in another type most would not be read.
        weights = weights.flatten(1).to(self.values.dtype)
        y = F.embedding_bag(places.flatten(1), self.values, per_sample_weights=weights, mode="sum")
        return y.to(x.dtype).view(x.shape)

    def look_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens ``(N, D)`` read: weights in at least float32 and int64 places of values, ``(N, heads, k)`` each."""
        q = self.query(x).unflatten(-1, self.scale.shape)
        step = max(1, SCORES // (self.heads * 2 * self.keys.shape[2]))
        again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or q.shape[0] <= step:
            weights, places = self._best(q)
            return weights, places
        # Split all at once: a slice's gradient would be written into zeros of the whole's size each time.
        found = [again(self._best, part) for part in q.split(step)]
        return torch.cat([w for w, _ in found]), torch.cat([p for _, p in found])

    def _best(self, q: Tensor) -> tuple[Tensor, Tensor]:
        k, n = self.topk, self.keys.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q = F.layer_norm(q.to(dtype), q.shape[-1:]) * self.scale.to(dtype) + self.shift.to(dtype)
            best, which = torch.einsum("nhpd,hpkd->nhpk", q, self.keys.to(dtype)).topk(k)
            a, b = self.pairs
            scores, of_pairs = (best[:, :, 0, a] + best[:, :, 1, b]).topk(k)
            pairs = which[:, :, 0, a] * n + which[:, :, 1, b]
            return scores.softmax(-1), pairs.gather(-1, of_pairs)


def candidates(k: int) -> list[tuple[int, int]]:
    """The pairs of places in two falling lists, one of which each of the ``k`` largest sums is at."""
    return [(a, b) for a in range(k) for b in range(k // (a + 1))]

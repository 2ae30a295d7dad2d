"""Products of queries and keys under decay, for all pairs of tokens of a chunk.

Definition, with ``G_t`` the sum of the log decays of the chunk's tokens up to and including ``t``:

    A_ts = sum_n x_tn y_sn exp(G_tn - G_sn)   for s <= t, and 0 for s > t

With one decay a head the exponential is a factor of the pair. With one a channel (gated linear attention, Yang et al. 2023, arXiv 2312.06635; Kimi delta
attention, arXiv 2510.26692) it is inside the sum, and is split at a token between the two, so that the sum is again a matrix product. Any pair of tokens lies in the
two halves of exactly one aligned block of ``2 b`` tokens, ``b`` a power of two; with ``m`` the last token of its first half,

    A_ts = sum_n (x_tn exp(G_tn - G_mn)) (y_sn exp(G_mn - G_sn))

and both exponents are sums of log decays, <= 0, at any decay: nothing is divided by, nothing overflows. Blocks grow from single tokens by doubling
(:func:`grow`), so a channel costs one exponential for each token and size of block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)

LEAST = -50.0
"""Smallest log decay that is told from smaller ones: beside what is written, the 2e-22 that it leaves is nothing, and a sum of them over a chunk stays exact to 4e-4."""


class Documents(NamedTuple):
    """Which document each token of some chunks belongs to: ``inside (n, M, T)``, and ``before (n, M)``, that of the token before the chunk."""

    inside: Tensor
    before: Tensor


class Decay:
    """Decay within chunks; one of the two kinds below. Chunks are ``(n, M, T, .)``: ``n`` of them one after another, ``M`` rows and heads.

    Attributes:
        into: what is left at each token of the state before the chunk ``(n, M, T, 1 or N)``, or ``None``: all of it.
        out: what is left of each token at the chunk's end, likewise.
        total: what the chunk leaves of the state before it ``(n, M, 1 or N, 1)``, or ``None``: all of it.
    """

    into: Tensor | None = None
    out: Tensor | None = None
    total: Tensor | None = None

    def __init__(self, G: Tensor | None, like: Tensor, documents: Documents | None) -> None:
        if G is not None:
            end = G[..., -1:, :]
            self.into, self.out, self.total = G.exp2(), (end - G).exp2(), end.exp2().mT
        if documents is not None:
            first = (documents.inside == documents.before[..., None])[..., None]
            last = (documents.inside == documents.inside[..., -1:])[..., None]
            self.into, self.out = _only(self.into, first, like), _only(self.out, last, like)
            self.total = _only(self.total, first[..., -1:, :], like)

    def products(self, readers: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        """``A (n, M, T, T)`` for each of ``readers (n, M, T, N)`` in place of ``x``."""
        raise TypeError(f"{type(self).__name__} does not define products")

    def gradients(
        self, readers: Sequence[Tensor], y: Tensor, dproducts: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the readers and of ``y``, ``G`` held, given those of the products (of which those with s > t are ignored).

        That of ``G_t`` is then ``sum over readers of x_t dx_t, minus y_t dy_t``, for every channel.
        """
        raise TypeError(f"{type(self).__name__} does not define gradients")


def decay_of(g: Tensor | None, like: Tensor, documents: Documents | None) -> Decay:
    """The decay of chunks like ``(n, M, T, N)``, of log decays ``(n, M, T, 1)``, ``(n, M, T, N)`` or ``None``; T a power of two where it is a channel's."""
    # Powers of two: exp2 is vectorised without a slow path for what underflows.
    G = None if g is None else g.cumsum(-2) * LOG2_E
    if G is None or G.shape[-1] == 1:
        return _HeadDecay(G, like, documents)
    return _ChannelDecay(G, like, documents)


class _HeadDecay(Decay):
    """One decay a head, or none."""

    def __init__(self, G: Tensor | None, like: Tensor, documents: Documents | None) -> None:
        super().__init__(G, like, documents)
        T = like.shape[-2]
        cut = torch.ones(T, T, dtype=torch.bool, device=like.device).triu(1)
        if documents is not None:
            cut = cut | (documents.inside[..., :, None] != documents.inside[..., None, :])
        # Pairs are cut before the exponential, whose gradient would not survive an overflow.
        self.weights = (like.new_zeros(()) if G is None else G - G.mT).masked_fill(cut, -math.inf).exp2()

    def products(self, readers: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        return [(x @ y.mT) * self.weights for x in readers]

    def gradients(
        self, readers: Sequence[Tensor], y: Tensor, dproducts: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        inner = [d * self.weights for d in dproducts]
        dy = inner[0].mT @ readers[0]
        for d, x in zip(inner[1:], readers[1:], strict=True):
            dy += d.mT @ x
        return [d @ y for d in inner], dy


class _ChannelDecay(Decay):
    """One decay a key channel."""

    def __init__(self, G: Tensor, like: Tensor, documents: Documents | None) -> None:
        super().__init__(G, like, documents)
        self.G = G
        self.cut = None if documents is None else documents.inside[..., :, None] != documents.inside[..., None, :]

    def _sizes(self) -> list[int]:
        return [1 << i for i in range(self.G.shape[-2].bit_length() - 1)]

    def _weights(self, b: int) -> tuple[Tensor, Tensor]:
        """What decay leaves between the middle of each block of ``2 b`` and the tokens of its second and first half."""
        G = halves(self.G, b)
        middle = G[..., 0, -1:, :]
        return (G[..., 1, :, :] - middle).exp2(), (middle - G[..., 0, :, :]).exp2()

    def products(self, readers: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        grown = [(x * y).sum(-1)[..., None, None] for x in readers]
        for b in self._sizes():
            later, earlier = self._weights(b)
            keys = halves(y, b)[..., 0, :, :] * earlier
            for i, x in enumerate(readers):
                queries = halves(x, b)[..., 1, :, :] * later
                grown[i] = grow(grown[i], queries @ keys.mT)
        found = [t.squeeze(-3) for t in grown]
        return found if self.cut is None else [t.masked_fill(self.cut, 0) for t in found]

    def gradients(
        self, readers: Sequence[Tensor], y: Tensor, dproducts: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        if self.cut is not None:
            dproducts = [d.masked_fill(self.cut, 0) for d in dproducts]
        own = [d.diagonal(dim1=-2, dim2=-1)[..., None] for d in dproducts]
        dreaders = [d * y for d in own]
        dy = torch.stack([d * x for d, x in zip(own, readers, strict=True)]).sum(0)
        for b in self._sizes():
            later, earlier = self._weights(b)
            keys = halves(y, b)[..., 0, :, :] * earlier
            dkeys = torch.zeros_like(keys)
            for x, dx, d in zip(readers, dreaders, dproducts, strict=True):
                pairs = lower(d, b)
                halves(dx, b)[..., 1, :, :].addcmul_(pairs @ keys, later)
                dkeys += pairs.mT @ (halves(x, b)[..., 1, :, :] * later)
            halves(dy, b)[..., 0, :, :].addcmul_(dkeys, earlier)
        return dreaders, dy


def halves(t: Tensor, b: int) -> Tensor:
    """``(..., T, N)`` as blocks of ``2 b`` tokens and their halves: ``(..., T / 2b, 2, b, N)``, a view."""
    return t.unflatten(-2, (-1, 2, b))


def lower(t: Tensor, b: int) -> Tensor:
    """Of ``(..., T, T)`` the lower left quarter of each block of ``2 b`` on the diagonal: ``(..., T / 2b, b, b)``."""
    quarters = t.unflatten(-1, (-1, 2, b)).unflatten(-4, (-1, 2, b))[..., 1, :, :, 0, :]  # (..., m, b, m, b)
    return quarters.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def grow(blocks: Tensor, quarters: Tensor) -> Tensor:
    """Lower triangular matrices ``(..., 2 m, b, b)`` in pairs on the diagonal of ``(..., m, 2 b, 2 b)``, with lower left quarters ``(..., m, b, b)``."""
    pairs = blocks.unflatten(-3, (-1, 2))
    upper = F.pad(pairs[..., 0, :, :], (0, blocks.shape[-1]))
    return torch.cat([upper, torch.cat([quarters, pairs[..., 1, :, :]], -1)], -2)


def unit_inverse(A: Tensor) -> Tensor:
    """``(I + A)^{-1}`` of strictly lower triangular ``A (..., T, T)``, T a power of two (what is not below the diagonal is ignored).

    Blocks grow by doubling: the quarter of an inverse is ``-(I + A_22)^{-1} A_21 (I + A_11)^{-1}``.
    """
    T = A.shape[-1]
    inverse = torch.ones_like(A[..., :1]).unsqueeze(-1)
    for b in (1 << i for i in range(T.bit_length() - 1)):
        pairs = inverse.unflatten(-3, (-1, 2))
        quarters = lower(A, b)
        if b > 1:
            quarters = pairs[..., 1, :, :] @ quarters @ pairs[..., 0, :, :]
        inverse = grow(inverse, -quarters)
    return inverse.squeeze(-3)


def scaled(t: Tensor, weight: Tensor | None) -> Tensor:
    """``t * weight``, where ``None`` is 1."""
    return t if weight is None else t * weight


def _only(weight: Tensor | None, where: Tensor, like: Tensor) -> Tensor:
    """``weight``, and 0 where it does not reach."""
    return where.to(like.dtype) if weight is None else weight.masked_fill(~where, 0)

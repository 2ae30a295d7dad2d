"""Patterns: who sees whom, as a function of positions, which blocks of it exist, and which keys a later query may still ask for.

A pattern says this much, and a test holds it to agree with itself:

    sees(i, j)           whether the query at position i sees the key at position j, for every pair
    extent(a, b, c, d)   of queries a <= i < b and keys c <= j < d: none (0), some (1) or all (2) of the pairs; "some" may be said too often, never "none" or "all"
    interval(i)          the first key that the query at i sees, and the one before which it ends, if that is all; patterns that are intervals are computed in tiles and gather nothing
    oldest(n)            no query at n or later sees a key before this position
    later(n, j)          whether a query at n or later may see the key at j < n; "may" may be said too often

Patterns are joined by ``|`` and ``&``. :func:`blocks_of` lists the blocks that exist (:class:`mmlong.ops.block_attention.Blocks`), once for each pattern and piece; only those are ever computed. The
same lists as FlexAttention takes them come from :func:`flex_block_mask`. :func:`kept` is what a stream must remember.

Positions count from the beginning of the document. Every pattern of the house lets a token see itself when it is a query: a row without a key is impossible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.block_attention import Blocks

NONE, SOME, ALL = 0, 1, 2

ROWS = 1 << 22
"""Pairs of blocks that are looked at together when lists are made."""

Array = Any
"""A numpy array or a tensor of integers; patterns use what both can do."""


class Pattern:
    """Who sees whom. Subclasses are frozen dataclasses, so that equal patterns share their lists."""

    def sees(self, i: Array, j: Array) -> Array:
        """Bool, broadcast, for positions of queries and keys."""
        raise TypeError(f"{type(self).__name__} does not define sees(i, j)")

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Int8, broadcast: none, some or all of the pairs of queries ``a <= i < b`` and keys ``c <= j < d``."""
        raise TypeError(f"{type(self).__name__} does not define extent(a, b, c, d)")

    def interval(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """``(first, stop)``, if all that the queries ``i`` see is an interval, ``first <= j < stop``; else ``None``. They may reach beyond the keys that there are."""
        return None

    def oldest(self, n: int) -> int:
        """The first position that a query at ``n`` or later may see."""
        return 0

    def later(self, n: int, j: np.ndarray) -> np.ndarray:
        """Bool: whether a query at ``n`` or later may see the keys ``j``, all of them from ``oldest(n)`` on and before ``n``."""
        return j == j

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, other)


def _levels(some: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Of bools: whether there may be a pair, and whether there are all."""
    return some.astype(np.int8) + (some & every).astype(np.int8)


@dataclass(frozen=True)
class Either(Pattern):
    """Seen by one or the other::

    window | global
    # . . . #
    # # . . .
    """

    one: Pattern
    other: Pattern

    def sees(self, i: Array, j: Array) -> Array:
        return self.one.sees(i, j) | self.other.sees(i, j)

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.maximum(self.one.extent(a, b, c, d), self.other.extent(a, b, c, d))

    def oldest(self, n: int) -> int:
        return min(self.one.oldest(n), self.other.oldest(n))

    def later(self, n: int, j: np.ndarray) -> np.ndarray:
        one, other = ((j >= p.oldest(n)) & p.later(n, j) for p in (self.one, self.other))
        return one | other


@dataclass(frozen=True)
class Both(Pattern):
    """Seen by one and the other. ``All`` of both is all; ``some`` of both may in truth be none, which costs time and is not wrong."""

    one: Pattern
    other: Pattern

    def sees(self, i: Array, j: Array) -> Array:
        return self.one.sees(i, j) & self.other.sees(i, j)

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.minimum(self.one.extent(a, b, c, d), self.other.extent(a, b, c, d))

    def interval(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        one, other = self.one.interval(i), self.other.interval(i)
        if one is None or other is None:
            return None
        return np.maximum(one[0], other[0]), np.minimum(one[1], other[1])

    def oldest(self, n: int) -> int:
        return max(self.one.oldest(n), self.other.oldest(n))

    def later(self, n: int, j: np.ndarray) -> np.ndarray:
        return self.one.later(n, j) & self.other.later(n, j)


@dataclass(frozen=True)
class Window(Pattern):
    """At most ``left`` keys before a query's own and ``right`` after it (``None``: all)::

    left 1, right 0:
    # . . .
    # # . .
    . # # .
    . . # #
    """

    left: int | None
    right: int | None

    def sees(self, i: Array, j: Array) -> Array:
        seen = (i == i) & (j == j)
        if self.left is not None:
            seen = seen & (i - j <= self.left)
        if self.right is not None:
            seen = seen & (j - i <= self.right)
        return seen

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        some = every = (a == a) & (c == c)
        if self.left is not None:
            some, every = some & (a - (d - 1) <= self.left), every & (b - 1 - c <= self.left)
        if self.right is not None:
            some, every = some & (c - (b - 1) <= self.right), every & (d - 1 - a <= self.right)
        return _levels(some, every)

    def interval(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        first = np.zeros_like(i) if self.left is None else i - self.left
        return first, np.full_like(i, np.iinfo(i.dtype).max) if self.right is None else i + self.right + 1

    def oldest(self, n: int) -> int:
        return 0 if self.left is None else max(0, n - self.left)


CAUSAL = Window(None, 0)
"""Everything up to the query's own key."""


@dataclass(frozen=True)
class SameBlock(Pattern):
    """The keys of the query's own block of ``size``, and ``before`` keys before the block and ``after`` after it::

    size 2:          size 2, before 1:
    # # . .          # # . .
    # # . .          # # . .
    . . # #          . # # #
    . . # #          . # # #
    """

    size: int
    before: int = 0
    after: int = 0

    def sees(self, i: Array, j: Array) -> Array:
        first = i // self.size * self.size
        return (j >= first - self.before) & (j < first + self.size + self.after)

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        first, last = (t // self.size * self.size for t in (a, b - 1))
        some = (d > first - self.before) & (c < last + self.size + self.after)
        return _levels(some, (c >= last - self.before) & (d <= first + self.size + self.after))

    def interval(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        first = i // self.size * self.size
        return first - self.before, first + self.size + self.after

    def oldest(self, n: int) -> int:
        return max(0, n // self.size * self.size - self.before)


@dataclass(frozen=True)
class LastOfBlocks(Pattern):
    """The last ``count`` keys of every block of ``size``::

    size 3, count 1:
    . . # . . #
    . . # . . #
    """

    size: int
    count: int

    def sees(self, i: Array, j: Array) -> Array:
        return (j % self.size >= self.size - self.count) & (i == i)

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        # Of the keys c..d-1, one is among the last of a block if the next such place at or after c comes before d.
        place = c % self.size
        next_one = np.where(place >= self.size - self.count, c, c + self.size - self.count - place)
        within = (place >= self.size - self.count) & (d - 1 - c < self.size - place)
        return _levels((next_one < d) & (a == a), within)

    def later(self, n: int, j: np.ndarray) -> np.ndarray:
        return j % self.size >= self.size - self.count


@dataclass(frozen=True)
class First(Pattern):
    """The first ``count`` keys, seen by all::

    count 1:
    # . . .
    # . . .
    """

    count: int

    def sees(self, i: Array, j: Array) -> Array:
        return (j < self.count) & (i == i)

    def extent(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        return _levels((c < self.count) & (a == a), (d <= self.count) & (a == a))

    def later(self, n: int, j: np.ndarray) -> np.ndarray:
        return j < self.count


def kept(pattern: Pattern, n: int) -> np.ndarray:
    """Int64, the positions before ``n`` that a query at ``n`` or later may see, in order."""
    j = np.arange(pattern.oldest(n), n)
    return j[pattern.later(n, j)]


def places_of(T: int, past: int, keeping: Pattern | None) -> np.ndarray:
    """Int64, the positions of the keys of a piece of ``T`` tokens after ``past`` others: those that ``keeping`` keeps (``None``: all), and the piece's own."""
    before = np.arange(past) if keeping is None else kept(keeping, past)
    return np.concatenate([before, np.arange(past, past + T)])


def blocks_of(
    pattern: Pattern,
    T: int,
    past: int = 0,
    *,
    keeping: Pattern | None = None,
    q_size: int = 64,
    k_size: int = 64,
    device: torch.device | str = "cpu",
) -> Blocks:
    """The blocks of a pattern that exist, for a piece of ``T`` queries after ``past`` tokens.

    Made once for a pattern and piece, and kept.

    Args:
        pattern: who sees whom.
        T, past: the queries stand at the positions ``past .. past + T - 1``.
        keeping: which keys of the past there are beside the piece's own, in the order of their positions (:func:`places_of`); ``None`` for all.
        q_size, k_size: tokens of a block of queries and of keys.
        device: of the lists.
    """
    return _blocks_of(pattern, T, past, keeping, q_size, k_size, str(device))


@lru_cache(maxsize=64)
def _blocks_of(
    pattern: Pattern, T: int, past: int, keeping: Pattern | None, q_size: int, k_size: int, device: str
) -> Blocks:
    places = places_of(T, past, keeping)
    S = len(places)
    rows, columns = -(-T // q_size), -(-S // k_size)
    # Where keys are left out, a block reaches from its first to its last: what none or all of that see, none or all of the keys do.
    first = np.arange(columns) * k_size
    last = np.minimum(first + k_size, S) - 1
    whole = last - first + 1 == k_size
    c, d = places[first][None], places[last][None] + 1
    step = max(1, ROWS // columns)
    lists: list[np.ndarray] = []
    counts, masked = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for r in range(0, rows, step):
        a = np.arange(r, min(r + step, rows))[:, None] * q_size
        b = np.minimum(a + q_size, T)
        level = np.broadcast_to(pattern.extent(a + past, b + past, c, d), (len(a), columns))
        # A block that the end of the keys cuts short has keys that are not there.
        level = np.where((level == ALL) & ~whole, SOME, level)
        for n, row in enumerate(level):
            some, every = np.flatnonzero(row == SOME), np.flatnonzero(row == ALL)
            lists.append(np.concatenate([some, every]))
            counts[r + n], masked[r + n] = len(lists[-1]), len(some)
    keys = np.full((rows, max(1, int(counts.max()))), -1, np.int64)
    for row, found in zip(keys, lists, strict=True):
        row[: len(found)] = found
    return Blocks(
        torch.from_numpy(keys)[None, None].to(device),
        q_size,
        k_size,
        pattern.sees,
        q_places=torch.arange(past, past + T, device=device)[None, None],
        k_places=torch.from_numpy(places)[None, None].to(device),
        counts=counts,
        masked=masked,
    )


def flex_block_mask(blocks: Blocks, L: int, S: int) -> Any:
    """The lists of a pattern as FlexAttention's ``BlockMask``; blocks of queries and keys as they are."""
    from torch.nn.attention.flex_attention import BlockMask

    if blocks.counts is None or blocks.masked is None:
        raise ValueError("flex_block_mask takes the lists of a pattern (blocks_of)")
    device = blocks.keys.device
    counts, masked = (torch.from_numpy(t).to(device, torch.int32)[None, None] for t in (blocks.counts, blocks.masked))
    # As wide as there are blocks, which is how it knows the number of keys.
    width = -(-S // blocks.k_size)
    keys = F.pad(blocks.keys.clamp_min(0), (0, width - blocks.keys.shape[3])).to(torch.int32)
    # Those that are seen whole stand after the others: a list of their own begins there.
    later = torch.arange(width, device=device) + masked[..., None]
    whole = keys.gather(3, later.clamp_max(width - 1).long())
    q_places, k_places = (t.to(device) for t in blocks.places(L, S))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = q_places[0, 0][i.clamp_max(L - 1)], k_places[0, 0][j.clamp_max(S - 1)]
        return (j >= 0) if blocks.sees is None else (j >= 0) & blocks.sees(i, j)

    return BlockMask.from_kv_blocks(
        masked,
        keys.contiguous(),
        counts - masked,
        whole.contiguous(),
        BLOCK_SIZE=(blocks.q_size, blocks.k_size),
        mask_mod=seen,
        seq_lengths=(L, S),
    )

"""Softmax attention where each block of queries meets its own list of blocks of keys, and no others are computed.

Definition, for every head, with ``T_b`` the key blocks listed for query block ``b`` and ``sees`` the pairs in them that count:

    s_ij = scale q_i . k_j;     y_i = sum_{j in T_b(i), sees(i, j)} exp(s_ij) v_j / sum of the same exp(s_ij);     l_i = the sum's logarithm

(block-sparse attention: Child et al. 2019, arXiv 1904.10509; Zaheer et al. 2020, arXiv 2007.14062.) The lists are either known from a pattern and the lengths alone (:mod:`mmlong.ops.block_patterns`), or chosen
by the data. The blocks of a list are copied side by side, a few thousand keys at a time, so that what is multiplied is dense and stays in the caches; whole blocks move, never single
rows. With ``l`` the results over different keys are merged by :func:`merge_parts`. The backward is written out and recomputes a tile's weights ``P``; with ``d_i = dY_i . Y_i - dl_i``:

    dV_j = sum_i P_ij dY_i;   dS_ij = P_ij (dY_i . V_j - d_i);   dQ_i = scale sum_j dS_ij K_j;   dK_j = scale sum_i dS_ij Q_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.tiled_attention import HIDDEN

TILE_ELEMENTS = 1 << 19
"""Scores of a tile on a CPU: they stay in its caches."""

GPU_TILE_ELEMENTS = 1 << 25
"""The same on other devices, where a call costs more than memory."""

MAX_KEYS = 4096
"""Keys of a tile; longer lists are taken in parts and merged."""

Sees = Callable[[Tensor, Tensor], Tensor]
"""Bool from int64 places of queries ``(..., q, 1)`` and of keys ``(..., 1, s)``, broadcast."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which key blocks each query block meets.

    Attributes:
        keys: int64 ``(B or 1, G or 1, query blocks, m)``, indices of key blocks, each at most once in a list; -1 for none.
        q_size, k_size: tokens of a block of queries and of keys. The last of each may be short.
        sees: which pairs count, from places; ``None`` for all.
        q_places: int64 ``(B or 1, G or 1, L)``, what ``sees`` is told of a query; ``None`` for its index, counted so that the last query has the place of the last key.
        k_places: int64 ``(B or 1, G or 1, S)``, of a key; negative for one that nobody sees. ``None`` for its index.
        counts: how many of the ``m`` columns are used, for each query block; ``None`` for all.
        masked: how many of them, at the front, hold pairs that do not count, for each query block; ``None`` for all. Blocks after those are seen whole.
    """

    keys: Tensor
    q_size: int
    k_size: int
    sees: Sees | None = None
    q_places: Tensor | None = None
    k_places: Tensor | None = None
    counts: np.ndarray | None = None
    masked: np.ndarray | None = None

    def mask(self, L: int, S: int) -> Tensor:
        """Bool ``(B or 1, G or 1, L, S)``, true where seen; quadratic, for tests and short sequences."""
        keys = self.keys
        n, columns = keys.shape[2], -(-S // self.k_size)
        unused = keys < 0
        if self.counts is not None:
            counts = torch.from_numpy(self.counts).to(keys.device)
            unused = unused | (torch.arange(keys.shape[3], device=keys.device) >= counts[:, None])
        listed = keys.new_zeros(*keys.shape[:3], columns + 1, dtype=torch.bool)
        listed.scatter_(3, torch.where(unused, columns, keys), True)
        listed = listed[..., :columns].repeat_interleave(self.k_size, 3)[..., :S]
        listed = listed.repeat_interleave(self.q_size, 2)[:, :, :L]
        if n * self.q_size < L:
            raise ValueError(f"{n} lists of blocks of {self.q_size} queries do not cover {L}")
        q, k = self.places(L, S)
        seen = (k >= 0)[..., None, :]
        if self.sees is not None:
            seen = seen & self.sees(q[..., :, None], k[..., None, :])
        return listed & seen

    def places(self, L: int, S: int) -> tuple[Tensor, Tensor]:
        """Places of queries and keys, ``(B or 1, G or 1, L)`` and ``(.., S)``."""
        device = self.keys.device
        q = torch.arange(S - L, S, device=device)[None, None] if self.q_places is None else self.q_places
        k = torch.arange(S, device=device)[None, None] if self.k_places is None else self.k_places
        return q, k


def block_attention_reference(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, with the full matrix of scores; arguments and result as :func:`block_attention`."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    mask = blocks.mask(q.shape[2], k.shape[2])
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(repeat, 1)
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~mask, HIDDEN)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scale: float | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks of keys; memory linear in the length.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, G, S, D)``, G dividing H: the heads of a group share their keys and their lists.
        v: ``(B, G, S, E)``.
        blocks: the lists.
        scale: of the scores; ``None`` for ``1 / sqrt(D)``.
        dropout: probability with which a weight is dropped; drawn from torch's generator, once for a call.

    Returns:
        ``y (B, H, L, E)`` like ``q``, and ``log_sums (B, H, L)``, in at least float32. Both have gradients. Where a query sees no key, ``y`` is a finite number and the log sum is so low
        that :func:`merge_parts` weighs it with nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    n, columns = -(-L // blocks.q_size), -(-S // blocks.k_size)
    shape = blocks.keys.shape
    if k.shape != (B, G, S, D) or v.shape[:3] != k.shape[:3] or H % G:
        raise ValueError(
            f"block_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D), (B, G, S, D) and (B, G, S, E) with G dividing H"
        )
    if len(shape) != 4 or shape[0] not in (1, B) or shape[1] not in (1, G) or shape[2] != n:
        raise ValueError(
            f"block_attention: lists {tuple(shape)} must be (1 or {B}, 1 or {G}, {n}, m) for {L} queries in blocks of {blocks.q_size}"
        )
    scale = 1 / math.sqrt(D) if scale is None else scale
    plan = _Plan(blocks, B, G, H // G, L, S, n, columns, scale, dropout, q.device)
    y, log_sums = _BlockAttention.apply(q, k, v, plan)
    return y, log_sums


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of keys, none of them in two, as over all of them: ``(y, log sums)`` from those of each set."""
    logs = torch.stack([log for _, log in parts])
    # Shares are not exp(log - total): a large total is rounded by more than its parts differ.
    y, *rest = (part * share[..., None] for (part, _), share in zip(parts, logs.softmax(0), strict=True))
    for more in rest:
        y = y + more
    return y.to(parts[0][0].dtype), logs.logsumexp(0)


class _Plan:
    """Tiles of units, a unit being one query block of one group of heads of one row; and what a tile needs beside queries, keys and values."""

    def __init__(
        self,
        blocks: Blocks,
        B: int,
        G: int,
        repeat: int,
        L: int,
        S: int,
        n: int,
        columns: int,
        scale: float,
        dropout: float,
        device: torch.device,
    ) -> None:
        self.blocks, self.B, self.G, self.repeat, self.L, self.S = blocks, B, G, repeat, L, S
        self.n, self.columns, self.scale, self.dropout = n, columns, scale, dropout
        m = blocks.keys.shape[3]
        self.counts = np.full(n, m) if blocks.counts is None else blocks.counts
        self.masked = self.counts if blocks.masked is None else blocks.masked
        first = torch.arange(B * G, device=device).view(B, G, 1, 1) * columns
        keys = blocks.keys.to(device)
        self.there = keys.expand(B, G, n, m).reshape(B * G * n, m) >= 0
        self.keys = (keys.clamp_min(0) + first).expand(B, G, n, m).reshape(B * G * n, m)
        q, k = (t.to(device) for t in blocks.places(L, S))
        q = F.pad(q, (0, n * blocks.q_size - L)).expand(B, G, -1)
        k = F.pad(k, (0, columns * blocks.k_size - S), value=-1).expand(B, G, -1)
        self.q_places = q.reshape(B * G * n, blocks.q_size)
        self.k_places = k.reshape(B * G * columns, blocks.k_size)
        self.seed = int(torch.randint(1 << 40, (1,))) if dropout else 0
        self._generator = torch.Generator(device) if dropout else None
        self.elements = TILE_ELEMENTS if device.type == "cpu" else GPU_TILE_ELEMENTS

    @property
    def alone(self) -> bool:
        """Whether no list is taken in parts."""
        return int(self.counts.max()) <= max(1, MAX_KEYS // self.blocks.k_size)

    def split(self, t: Tensor) -> Tensor:
        """Keys or values ``(B, G, S, D)`` as blocks ``(B G columns, k_size, D)``, of all groups."""
        size, parts = self.blocks.k_size, self.columns
        t = F.pad(t, (0, 0, 0, parts * size - t.shape[2])) if parts * size != t.shape[2] else t
        return t.reshape(-1, size, t.shape[3])

    def join(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return t.view(self.B, self.G, -1, t.shape[2])[:, :, : self.S]

    def place(self, units: slice) -> tuple[int, slice, slice]:
        """Row, heads and queries of the units of a tile; the last block of queries may be short."""
        b, g = divmod(units.start // self.n, self.G)
        first, last = units.start % self.n, (units.stop - 1) % self.n
        size = self.blocks.q_size
        return b, slice(g * self.repeat, (g + 1) * self.repeat), slice(first * size, min((last + 1) * size, self.L))

    def taken(self, t: Tensor, units: slice, dtype: torch.dtype) -> Tensor:
        """Of ``(B, H, L, ...)`` what belongs to a tile, ``(units, repeat q_size, ...)``; tile by tile, so that no copy of the whole is made; it may be a view. Zeros fill up the last block."""
        b, heads, queries = self.place(units)
        found = t[b, heads, queries].to(dtype)
        size, n = self.blocks.q_size, units.stop - units.start
        if (short := n * size - found.shape[1]) > 0:
            found = F.pad(found, (*[0, 0] * (found.ndim - 2), 0, short))
        return found.unflatten(1, (n, size)).transpose(0, 1).flatten(1, 2).contiguous()

    def put(self, t: Tensor, units: slice, found: Tensor | float) -> None:
        """The inverse of :meth:`taken`, into ``t``."""
        b, heads, queries = self.place(units)
        there = t[b, heads, queries]
        if isinstance(found, Tensor):
            there.copy_(found.unflatten(1, (self.repeat, -1)).transpose(0, 1).flatten(1, 2)[:, : there.shape[1]])
        else:
            there.fill_(found)

    def tiles(self) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
        """Units, and the columns of their lists that are taken together. Units of a tile lie in one group of heads, so that their lists are about as long."""
        rows, size = self.repeat * self.blocks.q_size, self.blocks.k_size
        most = max(1, MAX_KEYS // size)
        for base in range(0, self.B * self.G * self.n, self.n):
            i = 0
            while i < self.n:
                width = max(1, min(int(self.counts[i]), most))
                j = min(self.n, i + max(1, self.elements // (rows * width * size)))
                width = max(1, min(int(self.counts[i:j].max()), most))
                j = min(j, i + max(1, self.elements // (rows * width * size)))
                count = int(self.counts[i:j].max())
                yield slice(base + i, base + j), [(a, min(a + most, count)) for a in range(0, count, most)]
                i = j

    def gather(self, t: Tensor, units: slice, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """Blocks ``(.., k_size, D)`` of the columns ``a:b`` side by side: ``(units, (b - a) k_size, D)``."""
        index = self.keys[units, a:b]
        return t.index_select(0, index.flatten()).to(dtype).view(index.shape[0], -1, t.shape[2])

    def hide(self, scores: Tensor, units: slice, a: int, b: int) -> None:
        """Scores ``(units, repeat q_size, (b - a) k_size)`` of pairs that do not count."""
        inside = slice(units.start % self.n, (units.stop - 1) % self.n + 1)
        size, counts = self.blocks.k_size, self.counts[inside]
        upto = min(b, int(self.masked[inside].max()))
        if upto > a:
            index = self.keys[units, a:upto]
            k = self.k_places.index_select(0, index.flatten()).view(*index.shape, -1)
            k = k.masked_fill(~self.there[units, a:upto, None], -1).flatten(1)[:, None]
            hidden = (k < 0).expand(-1, self.blocks.q_size, -1)
            if self.blocks.sees is not None:
                hidden = hidden | ~self.blocks.sees(self.q_places[units, :, None], k)
            part = scores.unflatten(1, (self.repeat, -1))[..., : (upto - a) * size]
            part.masked_fill_(hidden[:, None], HIDDEN)
        short = max(a, int(counts.min()))
        if short < b:
            # Lists that end earlier than others of their tile.
            used = torch.from_numpy(np.ascontiguousarray(counts)).to(scores.device)
            beyond = torch.arange(short, b, device=scores.device) >= used[:, None]
            scores[..., (short - a) * size :].masked_fill_(beyond.repeat_interleave(size, 1)[:, None], HIDDEN)

    def drop(self, like: Tensor, units: slice, a: int) -> Tensor:
        """A factor for every weight of a tile: 0, or what makes up for those that are 0; the same each time that the tile is asked about."""
        assert self._generator is not None
        self._generator.manual_seed(self.seed ^ ((units.start * 0x9E3779B1 + a) & ((1 << 62) - 1)))
        return torch.empty_like(like).bernoulli_(1 - self.dropout, generator=self._generator).div_(1 - self.dropout)


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that sum to 1 over a tile, and the logarithms ``(.., 1)`` of the sums."""
    weights = scores.softmax(-1)
    return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys, values = plan.split(k), plan.split(v)
        (B, H, L, _), E = q.shape, v.shape[3]
        # Tokens before heads in memory: what comes next takes the heads of a token together.
        y = q.new_empty(B, L, H, E).transpose(1, 2)
        log_sums = q.new_empty(B, H, L, dtype=dtype)
        with torch.autocast(q.device.type, enabled=False):
            for units, parts in plan.tiles():
                scaled = plan.taken(q, units, dtype) * plan.scale
                out = total = None
                for a, b in parts:
                    scores = torch.bmm(scaled, plan.gather(keys, units, a, b, dtype).transpose(1, 2))
                    plan.hide(scores, units, a, b)
                    weights, log = _weights(scores)
                    if plan.dropout:
                        weights.mul_(plan.drop(weights, units, a))
                    part = torch.bmm(weights, plan.gather(values, units, a, b, dtype))
                    if out is None or total is None:
                        out, total = part, log
                    else:
                        both = torch.logaddexp(total, log)
                        out, total = out.mul_((total - both).exp()).add_(part.mul_((log - both).exp())), both
                plan.put(y, units, 0.0 if out is None else out)
                plan.put(log_sums, units, HIDDEN if total is None else total[..., 0])
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.plan = plan
        return y, log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlog: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dtype = log_sums.dtype
        # Where all lists fit a tile, what is subtracted from dY . V is the sum of just that: where one key has all the weight nothing remains, not a rounding.
        alone = plan.alone
        keys, values = plan.split(k), plan.split(v)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (keys, values))
        with torch.autocast(q.device.type, enabled=False):
            for units, parts in plan.tiles():
                scaled, dout = plan.taken(q, units, dtype) * plan.scale, plan.taken(dy, units, dtype)
                totals = plan.taken(log_sums, units, dtype)[..., None]
                # A query that sees nothing passes nothing on; its weights over its tile mean nothing. Nor does what fills up a block.
                totals = totals.masked_fill(totals <= HIDDEN / 2, 1e30)
                shared = None if alone else dout.mul(plan.taken(y, units, dtype)).sum(-1, keepdim=True)
                if dlog is not None:
                    given = plan.taken(dlog, units, dtype)[..., None]
                    shared = -given if shared is None else shared - given
                slopes_of_q = None
                for a, b in parts:
                    index = plan.keys[units, a:b].flatten()
                    found = plan.gather(keys, units, a, b, dtype)
                    scores = torch.bmm(scaled, found.transpose(1, 2))
                    plan.hide(scores, units, a, b)
                    weights, log = _weights(scores)
                    weights.mul_(log.sub_(totals).exp_())
                    slopes = torch.bmm(dout, plan.gather(values, units, a, b, dtype).transpose(1, 2))
                    met = weights
                    if plan.dropout:
                        factor = plan.drop(weights, units, a)
                        slopes.mul_(factor)
                        met = weights * factor
                    _add_blocks(dv, index, torch.bmm(met.transpose(1, 2), dout))
                    if alone:
                        slopes = torch._softmax_backward_data(slopes, weights, -1, dtype)
                        if shared is not None:
                            slopes.addcmul_(weights, shared, value=-1)
                    else:
                        assert shared is not None
                        slopes.sub_(shared).mul_(weights)
                    part = torch.bmm(slopes, found)
                    slopes_of_q = part if slopes_of_q is None else slopes_of_q.add_(part)
                    _add_blocks(dk, index, torch.bmm(slopes.transpose(1, 2), scaled))
                plan.put(dq, units, 0.0 if slopes_of_q is None else slopes_of_q.mul_(plan.scale))
        return dq, plan.join(dk).to(k.dtype), plan.join(dv).to(v.dtype), None


def _add_blocks(total: Tensor, index: Tensor, found: Tensor) -> None:
    """Blocks ``(units, m k_size, D)`` onto the blocks ``index`` of ``total (blocks, k_size, D)``."""
    total.view(total.shape[0], -1).index_add_(0, index, found.reshape(index.shape[0], -1))

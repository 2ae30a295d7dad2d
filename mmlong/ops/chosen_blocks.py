"""Softmax attention where every query has its own short list of whole blocks of keys: batched by the blocks, not by the queries.

Definition, for every head, with ``T_i`` the blocks that query ``i`` has chosen:

    s_ij = scale q_i . k_j;     y_i = sum_{j in T_i} exp(s_ij) v_j / sum of the same exp(s_ij);     l_i = the sum's logarithm

:mod:`mmlong.ops.block_attention` copies the blocks of a list side by side, which pays where many queries share a list. Where each has its own, every query would move all its keys: half a megabyte for 16 blocks of 64. Here the
pairs (query, block) are sorted by their block, as in MoBA (Lu et al. 2025, arXiv 2502.13189, algorithm 1): queries that chose the same block stand together in chunks of equal size, a chunk is one dense product with its block, and what moves
are rows of queries and of results. How many chunks there are is bounded by the sizes alone, so that on a device nothing waits for a number.

A query meets its blocks in different chunks. A first pass finds its largest score ``m_i``; the second adds ``exp(s_ij - m_i) v_j`` onto its row. The backward is written out and recomputes a chunk's weights ``P``; with ``d_i = dY_i . Y_i -
dl_i``:

    dV_j = sum_i P_ij dY_i;   dS_ij = P_ij (dY_i . V_j - d_i);   dQ_i = scale sum_j dS_ij K_j;   dK_j = scale sum_i dS_ij Q_i
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.tiled_attention import HIDDEN

TILE_ELEMENTS = 1 << 18
"""Scores of the chunks that are taken together on a CPU: with what they meet they stay in its caches."""

GPU_TILE_ELEMENTS = 1 << 25
"""The same on other devices, where a call costs more than memory."""

CHUNK_ROWS = 128
"""Rows of a product that pay for its start."""


def chosen_blocks_reference(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, k_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, with the full matrix of scores; arguments and result as :func:`chosen_blocks`."""
    H, S = q.shape[1], k.shape[2]
    columns = S // k_size
    listed = torch.zeros(*chosen.shape[:3], columns + 1, dtype=torch.bool, device=q.device)
    listed = listed.scatter(3, torch.where(chosen < 0, columns, chosen), True)[..., :columns]
    mask = F.pad(listed.repeat_interleave(k_size, 3), (0, S - columns * k_size))
    mask = mask.repeat_interleave(H // chosen.shape[1], 1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        k, v = (t.repeat_interleave(H // k.shape[1], dim=1).to(dtype) for t in (k, v))
        scores = (scale * (q.to(dtype) @ k.transpose(-1, -2))).masked_fill(~mask, HIDDEN)
        return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1)


@torch.compiler.disable
def chosen_blocks(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, k_size: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks of keys; memory linear in the length.

    Args:
        q: ``(B, H, L, D)``.
        k: ``(B, G, S, D)``, G dividing H.
        v: ``(B, G, S, E)``.
        chosen: int64 ``(B, C, L, m)``, of each query its blocks of keys, each at most once and below ``S // k_size``; -1 for none. C divides H and G divides C: the heads of a list share it.
        k_size: keys of a block.
        scale: of the scores; ``None`` for ``1 / sqrt(D)``.

    Returns:
        ``y (B, H, L, E)`` like ``q``, and ``log_sums (B, H, L)``, in at least float32; both have gradients. Where a query has no block ``y`` is a finite number, and the log sum is so low that
        :func:`mmlong.ops.block_attention.merge_parts` weighs it with nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, D) or v.shape[:3] != k.shape[:3] or H % G:
        raise ValueError(
            f"chosen_blocks: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D), (B, G, S, D) and (B, G, S, E) with G dividing H"
        )
    if chosen.ndim != 4 or chosen.shape[0] != B or chosen.shape[2] != L or H % chosen.shape[1] or chosen.shape[1] % G:
        raise ValueError(
            f"chosen_blocks: lists {tuple(chosen.shape)} must be ({B}, C, {L}, m) with C dividing {H} heads and {G} heads of keys dividing C"
        )
    scale = 1 / math.sqrt(D) if scale is None else scale
    if k_size > S or not chosen.shape[3]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(B, H, L, v.shape[3]), q.new_full((B, H, L), HIDDEN, dtype=dtype)
    y, log_sums = _ChosenBlocks.apply(q, k, v, _Plan(chosen, B, G, H, S // k_size, k_size, scale))
    return y, log_sums


class _Plan:
    """Chunks of pairs, all pairs of a chunk with one block.

    A *row* is a query of one list: ``(b * C + c) * L + i``; it has the ``repeat`` heads that share the list. ``rows (chunks, size)`` are the rows of each chunk, ``R`` where a chunk is not full; ``blocks (chunks,)`` its block of keys;
    ``places (R, m)`` says where in the chunks, flattened, the pairs of a row are, one past the last for a pair that is none.
    """

    def __init__(self, chosen: Tensor, B: int, G: int, H: int, columns: int, k_size: int, scale: float) -> None:
        lists, self.L, m = chosen.shape[1:]
        device = chosen.device
        on_cpu = device.type == "cpu" and not torch.compiler.is_exporting()
        self.B, self.G, self.lists, self.repeat = B, G, lists, H // lists
        self.columns, self.k_size, self.scale = columns, k_size, scale
        self.R = R = B * lists * self.L
        total, pairs = B * G * columns, R * m
        first = torch.arange(B * G, device=device).view(B, G, 1, 1, 1) * columns
        there = chosen.unflatten(1, (G, -1))
        block = torch.where(there < 0, total, there + first).flatten()
        ordered, order = block.sort(stable=True)
        edges = torch.searchsorted(ordered, torch.arange(total + 1, device=device))
        most = max(1, CHUNK_ROWS // self.repeat)
        self.size = size = max(1, min(most, pairs // total // 4))
        chunks = (edges.diff() + size - 1) // size
        ends = chunks.cumsum(0)
        # All pairs in full chunks, and one more for each block.
        count = int(ends[-1]) if on_cpu else pairs // size + min(total, pairs)
        number = torch.arange(count, device=device)
        of = torch.searchsorted(ends, number, right=True)
        used = of < total
        of = of.clamp_max(total - 1)
        begin = edges[of] + (number - (ends - chunks)[of]) * size
        place = begin[:, None] + torch.arange(size, device=device)
        full = used[:, None] & (place < edges[of + 1][:, None])
        pair = torch.where(full, order[place.clamp(0, pairs - 1)], pairs)
        self.blocks, self.rows = of, torch.where(full, pair // m, R)
        self.count = count
        places = torch.full((pairs + 1,), count * size, device=device)
        places[pair.flatten()] = torch.arange(count * size, device=device)
        self.places = places[:pairs].view(R, m)
        elements = TILE_ELEMENTS if on_cpu else GPU_TILE_ELEMENTS
        self.step = max(1, elements // (size * self.repeat * k_size))

    def tiles(self) -> Iterator[slice]:
        for a in range(0, self.count, self.step):
            yield slice(a, min(a + self.step, self.count))

    def split(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Heads ``(B, H, L, D)`` as rows ``(R + 1, repeat * D)``; the last is zero."""
        D = t.shape[3]
        rows = torch.empty(self.R + 1, self.repeat * D, dtype=dtype, device=t.device)
        rows[self.R] = 0
        target = rows[: self.R].view(self.B, self.lists, self.L, self.repeat, D).transpose(2, 3)
        target.copy_(t.unflatten(1, (self.lists, self.repeat)))
        return rows

    def join(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`split`: ``(B, H, L, D)``, its tokens before its heads in memory."""
        t = rows[: self.R].view(self.B, self.lists, self.L, self.repeat, -1)
        out = torch.empty(self.B, self.L, self.lists, self.repeat, t.shape[4], dtype=dtype, device=t.device)
        out.copy_(t.transpose(1, 2))
        return out.flatten(2, 3).transpose(1, 2)

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys ``(B, G, S, D)`` as blocks ``(B G columns, k_size, D)``."""
        return t[:, :, : self.columns * self.k_size].to(dtype).reshape(-1, self.k_size, t.shape[3])

    def take(self, rows: Tensor, tile: slice) -> Tensor:
        """The rows of some chunks, ``(chunks, size * repeat, D)``."""
        found = rows.index_select(0, self.rows[tile].flatten())
        return found.view(tile.stop - tile.start, self.size * self.repeat, -1)

    def add(self, total: Tensor, tile: slice, found: Tensor) -> None:
        """What was found for rows of chunks onto ``total (R + 1, ..)``."""
        total.index_add_(0, self.rows[tile].flatten(), found.view(-1, total.shape[1]))

    def add_keys(self, total: Tensor, tile: slice, found: Tensor) -> None:
        """What was found for the blocks of chunks onto ``total (blocks, k_size, D)``."""
        total.view(total.shape[0], -1).index_add_(0, self.blocks[tile], found.flatten(1))


class _ChosenBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        R, r, E = plan.R, plan.repeat, v.shape[3]
        with torch.autocast(q.device.type, enabled=False):
            queries = plan.split(q, dtype).mul_(plan.scale)
            keys, values = plan.cut(k, dtype), plan.cut(v, dtype)
            tops = torch.full((plan.count * plan.size + 1, r), HIDDEN, dtype=dtype, device=q.device)
            for tile in plan.tiles():
                scores = torch.bmm(plan.take(queries, tile), keys[plan.blocks[tile]].transpose(1, 2))
                tops[tile.start * plan.size : tile.stop * plan.size] = scores.amax(-1).view(-1, r)
            most = torch.full((R + 1, r), -HIDDEN, dtype=dtype, device=q.device)
            most[:R] = tops.index_select(0, plan.places.flatten()).view(R, -1, r).amax(1)
            y = torch.zeros(R + 1, r * E, dtype=dtype, device=q.device)
            sums = torch.zeros(R + 1, r, dtype=dtype, device=q.device)
            for tile in plan.tiles():
                scores = torch.bmm(plan.take(queries, tile), keys[plan.blocks[tile]].transpose(1, 2))
                weights, log = _weights(scores)
                share = (log - plan.take(most, tile).view(log.shape)).exp_()
                found = torch.bmm(weights, values[plan.blocks[tile]]).mul_(share)
                plan.add(y, tile, found)
                plan.add(sums, tile, share)
            none = sums == 0
            y.view(R + 1, r, E).div_(sums.masked_fill(none, 1)[..., None])
            logs = (most + sums.masked_fill(none, 1).log()).masked_fill_(none, HIDDEN)
            result, log_sums = plan.join(y, q.dtype), plan.join(logs, dtype)[..., 0].contiguous()
        ctx.save_for_backward(q, k, v, result, log_sums)
        ctx.plan = plan
        return result, log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlog: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dtype = log_sums.dtype
        with torch.autocast(q.device.type, enabled=False):
            shared = (dy.to(dtype) * y.to(dtype)).sum(-1)
            shared = shared if dlog is None else shared - dlog
            queries, dys = plan.split(q, dtype).mul_(plan.scale), plan.split(dy, dtype)
            # A query without a block passes nothing on, nor does a place of a chunk that is not full.
            totals = plan.split(log_sums.masked_fill(log_sums < HIDDEN / 2, -HIDDEN)[..., None], dtype)
            totals[plan.R] = -HIDDEN
            shares = plan.split(shared[..., None], dtype)
            keys, values = plan.cut(k, dtype), plan.cut(v, dtype)
            dq = torch.zeros_like(queries)
            dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in plan.tiles():
                asked, dout = plan.take(queries, tile), plan.take(dys, tile)
                found = keys[plan.blocks[tile]]
                scores = torch.bmm(asked, found.transpose(1, 2))
                weights, log = _weights(scores)
                weights.mul_((log - plan.take(totals, tile).view(log.shape)).exp_())
                slopes = torch.bmm(dout, values[plan.blocks[tile]].transpose(1, 2), out=scores)
                plan.add_keys(dv, tile, torch.bmm(weights.transpose(1, 2), dout))
                slopes.sub_(plan.take(shares, tile).view(log.shape)).mul_(weights)
                plan.add(dq, tile, torch.bmm(slopes, found))
                plan.add_keys(dk, tile, torch.bmm(slopes.transpose(1, 2), asked))
            dq = plan.join(dq.mul_(plan.scale), q.dtype)
            grown = [
                F.pad(t.view(plan.B, plan.G, -1, t.shape[2]), (0, 0, 0, like.shape[2] - plan.columns * plan.k_size))
                for t, like in ((dk, k), (dv, v))
            ]
        return dq, grown[0].to(k.dtype), grown[1].to(v.dtype), None


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that sum to 1 over a block, and the logarithms ``(.., 1)`` of the sums."""
    weights = scores.softmax(-1)
    return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()

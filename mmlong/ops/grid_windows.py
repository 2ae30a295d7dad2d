"""Softmax attention in windows of a grid with a learned bias for every offset, in tiles of cells that share their keys.

Definition, for every head, with ``W_i`` the cells that cell ``i`` sees and ``b`` a table over differences of coordinates:

    s_ij = scale q_i . k_j + b[offset(i, j)];     y_i = sum_{j in W_i} exp(s_ij) v_j / sum_{j in W_i} exp(s_ij)

``W_i`` is a product of an interval of each axis. So patterns are written for one axis (:class:`AxisTiles`), and the grid's tiles are the products of all. Tiles that are alike but for where they lie make a :class:`Group`, which has one
matrix of biases; there are few groups, and all but one are at the borders. Cells move as whole rows of all heads. The backward is written out and computes a tile's weights ``P`` again:

    dV_j = sum_i P_ij dY_i;   dS_ij = P_ij (dY_i . V_j - dY_i . Y_i);   dQ_i = scale sum_j dS_ij K_j;   dK_j = scale sum_i dS_ij Q_i;   db[o] = sum of dS_ij with offset o

so that between the two nothing is kept but queries, keys, values and results.

Patterns of an axis:

- :func:`shifted_windows`: Swin's (Liu et al. 2021, arXiv 2103.14030). Its cyclic shift wraps the ends of the axis into one window and then masks them from each other; they are windows of their own here, which is the same.
- :func:`neighbourhoods`: NAT's (Hassani et al. 2022, arXiv 2204.07143), dilated as in DiNAT (Hassani & Shi 2022, arXiv 2209.15001): cells at distances that the dilation divides, the nearest ``kernel`` of them, so that windows at a border do not shrink.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.tiled_attention import HIDDEN

TILE_ELEMENTS = 1 << 19
"""Scores that are there at a time on a CPU: they stay in its caches."""

GPU_TILE_ELEMENTS = 1 << 25
"""The same on other devices."""

SIDE = 8
"""Cells of a tile along an axis, where the pattern does not say."""


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis that are alike.

    Attributes:
        queries: int64 ``(n, t)``, the places of each tile.
        keys: int64 ``(n, s)``, the places that it meets.
        offsets: int64 ``(t, s)``, which offset of the table a pair has, from 0.
        seen: bool ``(t, s)``.
    """

    queries: np.ndarray
    keys: np.ndarray
    offsets: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of a grid that are alike; fields as :class:`AxisTiles`'s, of cells in raster order."""

    queries: np.ndarray
    keys: np.ndarray
    offsets: np.ndarray
    seen: np.ndarray


def _alike(tiles: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> tuple[AxisTiles, ...]:
    """Tiles ``(queries, keys, offsets, seen)``, those with the same offsets together."""
    kinds: dict[bytes, list[tuple[np.ndarray, ...]]] = {}
    for tile in tiles:
        name = b"|".join(t.tobytes() + str(t.shape).encode() for t in tile[2:])
        kinds.setdefault(name, []).append(tile)
    return tuple(
        AxisTiles(np.stack([t[0] for t in kind]), np.stack([t[1] for t in kind]), kind[0][2], kind[0][3])
        for kind in kinds.values()
    )


def shifted_windows(n: int, window: int, shift: int) -> tuple[AxisTiles, ...]:
    """Windows of an axis of ``n`` cells that begin at ``shift``; those at the ends may be short. An axis no longer than a window is one. Offsets are of the query from the key, and ``window - 1``."""
    edges = [0, n] if n <= window else sorted({0, n, *range(shift, n, window)})
    tiles = []
    for a, b in itertools.pairwise(edges):
        here = np.arange(a, b)
        tiles.append((here, here, here[:, None] - here + window - 1, np.ones((b - a, b - a), bool)))
    return _alike(tiles)


def neighbourhoods(n: int, kernel: int, dilation: int, side: int = SIDE) -> tuple[AxisTiles, ...]:
    """The nearest ``kernel`` cells of an axis of ``n`` at distances that ``dilation`` divides, all where there are fewer. Offsets are of the key from the query, in steps, and ``kernel - 1``."""
    tiles = []
    for first in range(min(dilation, n)):
        line = np.arange(first, n, dilation)
        m = len(line)
        width = min(kernel, m)
        for a in range(0, m, side):
            i = np.arange(a, min(a + side, m))
            start = np.clip(i - kernel // 2, 0, m - width)
            j = np.arange(start[0], start[-1] + width)
            seen = (j >= start[:, None]) & (j < start[:, None] + width)
            offsets = np.where(seen, j - i[:, None] + kernel - 1, 0)
            tiles.append((line[i], line[j], offsets, seen))
    return _alike(tiles)


def _product(a: AxisTiles | Group, b: AxisTiles, extent: int, offsets: int) -> Group:
    """Tiles of the axes so far with those of one axis more, which has ``extent`` cells and a table of ``offsets``."""
    queries, keys = (
        (r[:, None, :, None] * extent + c[None, :, None, :]).reshape(len(r) * len(c), -1)
        for r, c in ((a.queries, b.queries), (a.keys, b.keys))
    )
    size = (queries.shape[1], keys.shape[1])
    table = (a.offsets[:, None, :, None] * offsets + b.offsets[None, :, None, :]).reshape(size)
    seen = (a.seen[:, None, :, None] & b.seen[None, :, None, :]).reshape(size)
    return Group(queries, keys, table, seen)


def groups_of(tiles: Sequence[Sequence[AxisTiles]], grid: Sequence[int], offsets: Sequence[int]) -> tuple[Group, ...]:
    """The tiles of a grid, of each axis its own; a table has a place for every offset of all axes together, the last axis fastest."""
    found: list[Group] = [Group(t.queries, t.keys, t.offsets, t.seen) for t in tiles[0]]
    for line, extent, count in zip(tiles[1:], grid[1:], offsets[1:], strict=True):
        found = [_product(a, b, extent, count) for a in found for b in line]
    return tuple(found)


@torch.compiler.disable
@lru_cache(maxsize=32)
def swin_groups(grid: tuple[int, int], window: int, shift: int) -> tuple[Group, ...]:
    """Swin's windows of a grid."""
    rows, columns = (shifted_windows(n, window, shift) for n in grid)
    return groups_of((rows, columns), grid, (2 * window - 1,) * 2)


@torch.compiler.disable
@lru_cache(maxsize=32)
def neighbourhood_groups(grid: tuple[int, ...], kernel: tuple[int, ...], dilation: int) -> tuple[Group, ...]:
    """NAT's windows of a grid, so many cells along each axis."""
    side = (
        SIDE if len(grid) < 3 else SIDE // 2
    )  # a cube of eight has more keys that a cell does not see than such that it does
    tiles = [neighbourhoods(n, k, dilation, side) for n, k in zip(grid, kernel, strict=True)]
    return groups_of(tiles, grid, [2 * k - 1 for k in kernel])


def window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, groups: Sequence[Group], scale: float
) -> Tensor:
    """The definition, with the full matrix of scores; arguments and result as :func:`window_attention`."""
    L = q.shape[1]
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    added = torch.full((scores.shape[1], L, L), HIDDEN, dtype=scores.dtype, device=q.device)
    for group in groups:
        for queries, keys in zip(group.queries, group.keys, strict=True):
            i, j = np.nonzero(group.seen)
            offsets = torch.from_numpy(group.offsets[i, j])
            value = 0.0 if table is None else table[:, offsets]
            added[:, torch.from_numpy(queries[i]), torch.from_numpy(keys[j])] = value
    return torch.einsum("bhij,bjhd->bihd", (scores + added).softmax(-1), v)


@torch.compiler.disable
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, groups: Sequence[Group], scale: float
) -> Tensor:
    """Attention in windows of a grid.

    Args:
        q, k, v: ``(B, L, H, D)``, cells in raster order.
        table: ``(H, offsets)``, a bias for every offset; ``None`` for none.
        groups: tiles, in which every cell is a query once.
        scale: of the products.

    Returns:
        ``(B, L, H, D)`` like ``q``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    biases = []
    for group in groups:
        offsets, seen = (torch.from_numpy(t).to(q.device) for t in (group.offsets, group.seen))
        if table is None:
            bias = torch.zeros(1, *seen.shape, dtype=dtype, device=q.device)
        else:
            bias = table.to(dtype).index_select(1, offsets.flatten()).unflatten(1, seen.shape)
        biases.append(bias if bool(group.seen.all()) else bias.masked_fill(~seen, HIDDEN))
    return _Windows.apply(q, k, v, groups, scale, *biases)


class _Tiles:
    """Tiles of one group, a few at a time: rows of the flattened batch."""

    def __init__(self, group: Group, B: int, L: int, H: int, device: torch.device) -> None:
        first = torch.arange(B, device=device)[:, None, None] * L
        self.queries, self.keys = (
            (torch.from_numpy(t).to(device) + first).flatten(0, 1) for t in (group.queries, group.keys)
        )
        elements = TILE_ELEMENTS if device.type == "cpu" else GPU_TILE_ELEMENTS
        self.step = max(1, elements // (H * group.seen.size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.queries), self.step):
            yield self.queries[i : i + self.step], self.keys[i : i + self.step]


def _taken(t: Tensor, rows: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """Rows ``(n, s)`` of ``(B L, H D)`` as ``(n H, s, D)``."""
    found = t.index_select(0, rows.flatten()).to(dtype).view(*rows.shape, H, -1)
    return found.transpose(1, 2).reshape(rows.shape[0] * H, rows.shape[1], -1)


def _tokens(t: Tensor, H: int) -> Tensor:
    """``(n H, s, D)`` as rows ``(n s, H D)``."""
    return t.unflatten(0, (-1, H)).transpose(1, 2).reshape(-1, H * t.shape[2])


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float, *biases: Tensor
    ) -> Tensor:
        B, L, H, D = q.shape
        dtype = biases[0].dtype
        flat = [t.reshape(B * L, H * D) for t in (q, k, v)]
        y = torch.empty_like(flat[0])
        with torch.autocast(q.device.type, enabled=False):
            for group, bias in zip(groups, biases, strict=True):
                for queries, keys in _Tiles(group, B, L, H, q.device):
                    weights = _weights(flat[0], flat[1], queries, keys, bias, H, scale)[0]
                    out = torch.bmm(weights, _taken(flat[2], keys, H, dtype))
                    y.index_copy_(0, queries.flatten(), _tokens(out, H).to(y.dtype))
        ctx.save_for_backward(*flat, y, *biases)
        ctx.groups, ctx.scale, ctx.shape = groups, scale, q.shape
        return y.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        q, k, v, y, *biases = ctx.saved_tensors
        (B, L, H, D), scale = ctx.shape, ctx.scale
        dtype = biases[0].dtype
        dy = dy.reshape(B * L, H * D)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(B * L, H * D, dtype=dtype, device=q.device) for _ in range(2))
        dbiases = [torch.zeros_like(bias) for bias in biases]
        with torch.autocast(q.device.type, enabled=False):
            for group, bias, dbias in zip(ctx.groups, biases, dbiases, strict=True):
                for queries, keys in _Tiles(group, B, L, H, q.device):
                    weights, scaled, found = _weights(q, k, queries, keys, bias, H, scale)
                    dout, out = (_taken(t, queries, H, dtype) for t in (dy, y))
                    slopes = torch.bmm(dout, _taken(v, keys, H, dtype).transpose(1, 2))
                    dv.index_add_(0, keys.flatten(), _tokens(torch.bmm(weights.transpose(1, 2), dout), H))
                    slopes.sub_((dout * out).sum(-1, keepdim=True)).mul_(weights)
                    dbias += slopes.unflatten(0, (-1, H)).sum(0).sum_to_size(dbias.shape)
                    dq.index_copy_(0, queries.flatten(), _tokens(torch.bmm(slopes, found).mul_(scale), H).to(dq.dtype))
                    dk.index_add_(0, keys.flatten(), _tokens(torch.bmm(slopes.transpose(1, 2), scaled), H))
        shaped = [t.view(ctx.shape) for t in (dq, dk.to(k.dtype), dv.to(v.dtype))]
        return *shaped, None, None, *dbiases


def _weights(
    q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, bias: Tensor, H: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``(n H, t, s)`` of a few tiles, their scaled queries and their keys."""
    scaled = _taken(q, queries, H, bias.dtype).mul_(scale)
    found = _taken(k, keys, H, bias.dtype)
    scores = torch.bmm(scaled, found.transpose(1, 2))
    scores.unflatten(0, (-1, H)).add_(bias)
    return scores.softmax(-1), scaled, found

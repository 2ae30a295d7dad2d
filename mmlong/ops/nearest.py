"""The nearest of many keys: exact search, in tiles, of keys in memory or on a disk.

Definition, for every query ``q``:

    l2    the k keys with the least  d(q, k_j) = sum_c (q_c - k_jc)^2
    dot   the k keys with the most   q . k_j

of equals the first. Keys may be stored in float16 or float32, memory-mapped too: a tile of them is read, once for all queries, turned to float32 (float64 for queries of it), met with the queries in a product, and its best are merged with the best so far. So memory is that of a
tile and of what is found, whatever the number of keys. Distances rank by ``|k|^2 - 2 q . k``, whose rounding may order what is all but equal otherwise than the definition; those that are returned are summed from differences.

``search: faiss`` has each tile searched by faiss (Douze et al. 2024, arXiv 2401.08281; the extra ``mmlong[faiss]``) on a CPU in float32: exact too, by its own products and heaps, which of equals takes any.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmlong.ops.top import top_indices

Metric = Literal["l2", "dot"]
METRICS = ("l2", "dot")
SEARCHES = ("exact", "faiss")

TILE_ELEMENTS = 1 << 22
"""Scores of a tile, and about as many numbers of keys."""

Hidden = Callable[[slice, slice], Tensor]
"""Of some queries and some keys: bool ``(queries, keys)``, true where a query may not find a key."""


def require_search(search: str) -> None:
    """Raise unless there is such a search and it can run.

    Raises:
        ValueError: an unknown one.
        ImportError: what it needs is not installed; the message names the extra.
    """
    if search not in SEARCHES:
        raise ValueError(f"search is {search!r}; it can be {' or '.join(SEARCHES)}")
    if search == "faiss":
        _faiss()


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "search: faiss needs faiss, not installed: pip install 'mmlong[faiss]', or take search: exact"
        ) from error


def nearest(
    queries: Tensor,
    keys: Tensor | np.ndarray,
    k: int,
    metric: Metric = "l2",
    *,
    search: str = "exact",
    hidden: Hidden | None = None,
    tile: int = TILE_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest keys of every query, the nearest first; nothing here has a gradient.

    Args:
        queries: ``(Q, D)``.
        keys: ``(N, D)``, on any device, or an array that may be mapped from a file.
        k: how many, at least 1.
        metric: ``l2`` or ``dot``.
        search: ``exact`` or ``faiss``.
        hidden: which keys a query may not find; ``None``: it may find all. Exact search only.
        tile: scores at a time.

    Returns:
        ``(values, index)``, both ``(Q, k)``: squared distances or products in float32 (float64 of queries of it), and int64 places; where there are fewer than ``k``, infinitely far, with -1.

    Raises:
        ValueError: shapes that do not fit, no key to find, an unknown metric or search, or ``hidden`` with faiss.
        ImportError: faiss is not installed.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"nearest: queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (Q, D) and (N, D)"
        )
    if k < 1 or tile < 1:
        raise ValueError(f"nearest: k and tile must be at least 1, got {k} and {tile}")
    if metric not in METRICS:
        raise ValueError(f"nearest: metric is {metric!r}; it can be {' or '.join(METRICS)}")
    require_search(search)
    if search == "faiss" and hidden is not None:
        raise ValueError("nearest: faiss finds among all keys; take search: exact where some are hidden")
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        return _nearest(queries, keys, k, metric, search, hidden, tile)


def _nearest(
    queries: Tensor, keys: Tensor | np.ndarray, k: int, metric: Metric, search: str, hidden: Hidden | None, tile: int
) -> tuple[Tensor, Tensor]:
    device, dtype = queries.device, torch.promote_types(queries.dtype, torch.float32)
    (Q, D), N = queries.shape, keys.shape[0]
    q = queries.to(dtype)
    worst = math.inf if metric == "l2" else -math.inf
    # The larger the nearer, in both metrics, while it is searched.
    best = torch.full((Q, k), -math.inf, dtype=dtype, device=device)
    index = torch.full((Q, k), -1, dtype=torch.int64, device=device)
    wide = min(N, max(1, tile // max(1, D)))
    high = max(1, tile // max(1, wide))
    for a in range(0, N, max(1, wide)):
        b = min(a + wide, N)
        block = _read(keys, a, b, device, dtype)
        squares = (block * block).sum(1) if metric == "l2" else None
        for i in range(0, Q, high):
            rows = slice(i, min(i + high, Q))
            if search == "faiss":
                scores, places = _by_faiss(q[rows], block, k, metric)
            else:
                scores = q[rows] @ block.T
                if squares is not None:
                    scores.mul_(2).sub_(squares)
                if hidden is not None:
                    scores.masked_fill_(hidden(rows, slice(a, b)).to(device), -math.inf)
                scores, places = _better(scores, best[rows, -1:]) if a >= k else _top(scores, k)
            places = torch.where(places >= 0, places + a, -1)
            # Stable, so that what came before stands before its equals.
            joined = torch.cat([best[rows], scores], 1)
            joined, order = joined.sort(dim=1, descending=True, stable=True)
            best[rows] = joined[:, :k]
            index[rows] = torch.cat([index[rows], places], 1).gather(1, order[:, :k])
    if metric == "dot":
        return best, index
    return _distances(q, keys, best, index, tile, worst)


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of each row in falling order, of equals the first; -1 for none."""
    k = min(k, scores.shape[1])
    places = top_indices(scores, k).sort(dim=1).values
    found = scores.gather(1, places.clamp_min(0)).masked_fill(places < 0, -math.inf)
    found, order = found.sort(dim=1, descending=True, stable=True)
    return found, places.gather(1, order)


def _better(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Those above the least ``(Q, 1)`` that would still be kept, in the order of their places; -1 behind them. After the first tiles few are, and to find them is one look at each."""
    row, place = (scores > least).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(scores))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = int(counts.max()) if len(row) else 0
    found = scores.new_full((len(scores), width), -math.inf)
    places = torch.full_like(found, -1, dtype=torch.int64)
    found[row, slot], places[row, slot] = scores[row, place], place
    return found, places


def _by_faiss(q: Tensor, block: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    faiss = _faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    a, b = (np.ascontiguousarray(t.float().cpu().numpy()) for t in (q, block))
    values, places = faiss.knn(a, b, min(k, len(b)), metric=kind)
    found = torch.from_numpy(values).to(q.device, q.dtype)
    where = torch.from_numpy(places.astype(np.int64)).to(q.device)
    if metric == "l2":
        # As the other search has it: without the query's own square.
        found = (q * q).sum(1, keepdim=True) - found
    return found.masked_fill(where < 0, -math.inf), where


def _distances(
    q: Tensor, keys: Tensor | np.ndarray, best: Tensor, index: Tensor, tile: int, worst: float
) -> tuple[Tensor, Tensor]:
    """Squared distances summed from differences, in their order."""
    found = torch.full_like(best, worst)
    high = max(1, tile // max(1, index.shape[1] * q.shape[1]))
    for i in range(0, len(q), high):
        rows = slice(i, min(i + high, len(q)))
        there = index[rows] >= 0
        near = take_keys(keys, index[rows].clamp_min(0).flatten(), q.device, q.dtype) if len(keys) else q[:0]
        if len(near):
            near = near.view(*there.shape, -1).sub_(q[rows, None])
            found[rows] = near.square_().sum(-1).masked_fill_(~there, worst)
    # Rounding may have ordered what is all but equal otherwise.
    found, order = found.sort(dim=1, stable=True)
    return found, index.gather(1, order)


def _read(keys: Tensor | np.ndarray, a: int, b: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(keys, Tensor):
        return keys[a:b].to(device, dtype)
    return torch.from_numpy(np.array(keys[a:b])).to(device, dtype)


def take_keys(keys: Tensor | np.ndarray, index: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows of keys in memory of their own: ``(n, D)`` for int64 ``index (n,)``."""
    if isinstance(keys, Tensor):
        return keys.index_select(0, index.to(keys.device)).to(device, dtype)
    return torch.from_numpy(keys[index.cpu().numpy()]).to(device, dtype)

"""Windows of a grid: every cell is a query once, and the tiles give what the full matrix of scores gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlong.ops.grid_windows import (
    neighbourhood_groups,
    neighbourhoods,
    shifted_windows,
    swin_groups,
    window_attention,
    window_attention_reference,
)

GROUPS: list[tuple[str, Any, int]] = [
    ("swin", swin_groups((7, 10), 3, 0), 25),
    ("swin, shifted", swin_groups((9, 6), 4, 3), 49),
    ("neighbours", neighbourhood_groups((11, 20), (5, 5), 1), 81),
    ("neighbours, dilated", neighbourhood_groups((9, 11), (3, 3), 3), 25),
    ("a line", neighbourhood_groups((1, 40), (7, 7), 1), 169),
    ("one cell", neighbourhood_groups((1, 1), (3, 3), 2), 25),
    ("neighbours in a cube", neighbourhood_groups((6, 5, 9), (3, 3, 3), 1), 125),
    ("frames", neighbourhood_groups((2, 7, 6), (3, 1, 5), 2), 45),
]


@pytest.mark.parametrize(("groups", "places"), [pytest.param(g, n, id=name) for name, g, n in GROUPS])
def test_every_cell_is_a_query_once(groups: Any, places: int) -> None:
    queries = np.concatenate([g.queries.reshape(-1) for g in groups])
    assert np.array_equal(np.sort(queries), np.arange(len(queries)))
    for group in groups:
        assert bool(group.seen.any(1).all()), "a query without a key"
        assert 0 <= group.offsets.min() <= group.offsets.max() < places


@pytest.mark.parametrize("tile", [1 << 19, 1 << 8])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("groups", "places"), [pytest.param(g, n, id=name) for name, g, n in GROUPS])
def test_tiles_are_the_definition(
    groups: Any, places: int, biased: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmlong.ops.grid_windows.TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    L = sum(g.queries.size for g in groups)
    leaves = [torch.randn(2, L, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    table: Tensor | None = None
    if biased:
        table = torch.randn(3, places, dtype=torch.float64, requires_grad=True)
        leaves.append(table)
    q, k, v = leaves[:3]
    y, expected = (f(q, k, v, table, groups, 0.7) for f in (window_attention, window_attention_reference))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_axes() -> None:
    """Which tiles there are: few kinds, whatever the length."""
    assert len(shifted_windows(64, 8, 0)) == 1
    assert [t.queries.tolist() for t in shifted_windows(11, 4, 2)] == [[[0, 1]], [[2, 3, 4, 5], [6, 7, 8, 9]], [[10]]]
    assert len(neighbourhoods(1024, 7, 1)) == 3, "both ends, and the rest"
    assert len(shifted_windows(3, 7, 3)) == 1, "an axis no longer than a window is one"


def test_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    groups, table = swin_groups((8, 8), 4, 2), torch.randn(2, 49, requires_grad=True)
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))
    low = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    y = window_attention(*low, table, groups, 0.3)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), window_attention(q, k, v, table, groups, 0.3), rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(y.float().sum(), [*low, table])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3 + [torch.float32]

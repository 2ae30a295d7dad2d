"""Exact search against all distances at once: tiles, storage, equals, hidden keys, and faiss."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlong.ops.nearest import nearest


def by_definition(q: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    all_of_them = ((q[:, None] - keys) ** 2).sum(-1) if metric == "l2" else q @ keys.T
    return tuple(t[:, :k] for t in all_of_them.sort(dim=1, descending=metric == "dot", stable=True))  # type: ignore[return-value]


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("tile", [1 << 22, 97, 1])
@pytest.mark.parametrize("k", [1, 7, 63])
def test_is_its_definition(metric: Any, tile: int, k: int) -> None:
    torch.manual_seed(0)
    q, keys = torch.randn(5, 6, dtype=torch.float64), torch.randn(63, 6, dtype=torch.float64)
    values, index = nearest(q, keys, k, metric, tile=tile)
    want, places = by_definition(q, keys, k, metric)
    torch.testing.assert_close(values, want)
    assert torch.equal(index, places)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("tile", [1 << 22, 30])
def test_of_equals_the_first(metric: Any, tile: int) -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
    _, index = nearest(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), keys, 4, metric, tile=tile)
    assert index.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
@pytest.mark.parametrize("mapped", ["numpy", "torch"])
def test_keys_on_a_disk(tmp_path: Path, dtype: str, mapped: str) -> None:
    torch.manual_seed(0)
    stored = torch.randn(257, 8).numpy().astype(dtype)
    stored.tofile(tmp_path / "keys")
    if mapped == "numpy":
        keys: Any = np.memmap(tmp_path / "keys", dtype, "r", shape=(257, 8))
    else:
        kind = torch.float16 if dtype == "<f2" else torch.float32
        keys = torch.from_file(str(tmp_path / "keys"), shared=False, size=257 * 8, dtype=kind).view(257, 8)
    q = torch.randn(3, 8)
    values, index = nearest(q, keys, 9, tile=200)
    want, places = by_definition(q, torch.from_numpy(stored).float(), 9, "l2")
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, want)
    assert torch.equal(index, places)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_fewer_keys_than_asked_for_and_hidden_ones(metric: Any) -> None:
    q, keys = torch.randn(4, 3), torch.randn(6, 3)
    far = math.inf if metric == "l2" else -math.inf
    values, index = nearest(q, keys, 8, metric, tile=7)
    assert (index[:, 6:] == -1).all()
    assert (values[:, 6:] == far).all()
    assert index[:, :6].sort(1).values.tolist() == [list(range(6))] * 4
    forbidden = torch.rand(4, 6) < 0.5
    forbidden[0] = True
    values, index = nearest(q, keys, 6, metric, hidden=lambda rows, cols: forbidden[rows, cols], tile=7)
    for row in range(4):
        assert {n for n in index[row].tolist() if n >= 0} == set((~forbidden[row]).nonzero().flatten().tolist())
        assert (values[row][index[row] < 0] == far).all()
    values, index = nearest(q, keys[:0], 2, metric)
    assert (index == -1).all()
    assert (values == far).all()


def test_distances_near_zero_are_not_lost() -> None:
    """Where ``|q|^2 - 2 q k + |k|^2`` in float32 has no digit left."""
    keys = 1000 + torch.arange(4.0)[:, None] * 0.001 + torch.zeros(4, 16)
    values, _ = nearest(keys[:1], keys, 4)
    torch.testing.assert_close(values[0], ((keys - keys[0]) ** 2).sum(1).sort().values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "at least 1"),
        ({"metric": "cosine"}, "l2 or dot"),
        ({"search": "guess"}, "exact or faiss"),
        ({"keys": torch.zeros(3, 5)}, r"must be \(Q, D\) and \(N, D\)"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nearest(**{"queries": torch.zeros(2, 4), "keys": torch.zeros(3, 4), "k": 1, **change})


def test_faiss_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"mmlong\[faiss\]"):
        nearest(torch.zeros(2, 4), torch.zeros(3, 4), 1, search="faiss")


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("tile", [1 << 22, 200])
def test_faiss_finds_the_same(metric: Any, tile: int) -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    q, keys = torch.randn(7, 8), torch.randn(257, 8)
    for one, other in zip(
        nearest(q, keys, 9, metric, tile=tile), nearest(q, keys, 9, metric, search="faiss", tile=tile), strict=True
    ):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="exact"):
        nearest(q, keys, 9, metric, search="faiss", hidden=lambda rows, cols: torch.zeros(1, dtype=torch.bool))

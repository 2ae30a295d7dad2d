"""Chunked cross-attention against its definition, and against retro-pytorch's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from mmlong.ops.chunked_cross_attention import (
    chunk_read,
    chunked_cross_attention,
    chunked_cross_attention_reference,
)


def test_the_offset() -> None:
    """The last token of a chunk is the first to read of it, the last but one of the next the last."""
    assert chunk_read(torch.arange(12), 4).tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert chunk_read(torch.arange(3), 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("batch", "length", "m"), [(3, 63, 8), (1, 5, 8), (1, 20, 1)])
def test_is_its_definition(batch: int, length: int, m: int) -> None:
    torch.manual_seed(0)
    U, H, S, D = max(1, length // m), 2, 5, 4
    q = torch.randn(batch, H, length, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(batch, U, H, S, n, dtype=torch.float64, requires_grad=True) for n in (D, 3))
    there = torch.rand(batch, U, S) < 0.6
    there[:, 0] = False
    index = torch.arange(length).expand(batch, -1)
    which, place = chunk_read(index, m), (index + 1) % m
    y = chunked_cross_attention(q, k, v, there, which, place, m)
    want = chunked_cross_attention_reference(q, k, v, there, which)
    torch.testing.assert_close(y, want)
    if there.any() and length > m:
        weight = torch.randn_like(y)
        for one, other in zip(*(torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (y, want)), strict=True):
            torch.testing.assert_close(one, other)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must be"):
        chunked_cross_attention(
            torch.zeros(1, 2, 3, 4), *(torch.zeros(1, 1, 2, 5, 4),) * 2, torch.ones(1, 1, 6, dtype=torch.bool),
            *(torch.zeros(1, 3, dtype=torch.long),) * 2, 3,
        )  # fmt: skip


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """retro-pytorch's module of layers alone: its package imports what builds indexes, which is not needed here."""
    spec = importlib.util.find_spec("retro_pytorch")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("retro-pytorch is not installed")
    package, retrieval = types.ModuleType("retro_pytorch"), types.ModuleType("retro_pytorch.retrieval")
    package.__path__ = list(spec.submodule_search_locations)
    retrieval.BERT_VOCAB_SIZE = 28996  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "retro_pytorch", package)
    monkeypatch.setitem(sys.modules, "retro_pytorch.retrieval", retrieval)
    monkeypatch.delitem(sys.modules, "retro_pytorch.retro_pytorch", raising=False)
    return importlib.import_module("retro_pytorch.retro_pytorch")


@pytest.mark.parametrize("length", [64, 63, 37, 16])
def test_is_theirs(theirs: Any, length: int) -> None:
    torch.manual_seed(0)
    m, k, r, dim, heads = 16, 2, 24, 12, 3
    B, U = 2, length // m
    layer = theirs.ChunkedCrossAttention(m, dim=dim, heads=heads, dim_head=4).double()
    # Without the null key and value, which are theirs.
    attend = layer.cross_attn
    attend.null_k = attend.null_v = None
    x = torch.randn(B, length, dim, dtype=torch.float64, requires_grad=True)
    context = torch.randn(B, U, k, r, dim, dtype=torch.float64, requires_grad=True)
    there = torch.rand(B, U, k, r) < 0.7
    none = torch.zeros(1, 1, m, 4, dtype=torch.float64), torch.zeros(1, 1, r, 4, dtype=torch.float64)
    want = layer(x, context=context, context_mask=there, pos_emb=none)
    flat = context.flatten(2, 3)
    q = attend.to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = (f(flat).unflatten(-1, (heads, -1)).transpose(2, 3) for f in (attend.to_k, attend.to_v))
    index = torch.arange(length).expand(B, -1)
    y = chunked_cross_attention(q, keys, values, there.flatten(2), chunk_read(index, m), (index + 1) % m, m)
    y = attend.to_out(y.transpose(1, 2).flatten(2))
    # Theirs adds nothing where nothing is read, ours goes through the bias there.
    y = torch.where((chunk_read(index, m) >= 0)[..., None], y, 0)
    torch.testing.assert_close(y, want)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((t * weights).sum(), (x, context)) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b)

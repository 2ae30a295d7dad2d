"""Attention over the best keys: beside its definition, in float64; and the loss of an indexer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.ops.best_keys import Index, best_keys_attention, best_keys_reference, indexer_loss


def given(B: int, H: int, G: int, L: int, S: int) -> list[Tensor]:
    r = torch.Generator().manual_seed(0)
    shapes = [(B, H, L, 6), (B, G, S, 6), (B, G, S, 5)]
    return [torch.randn(s, generator=r, dtype=torch.float64).requires_grad_() for s in shapes]


def indexer(B: int, L: int, S: int) -> Index:
    """Three heads of three channels; many scores are exactly 0."""
    r = torch.Generator().manual_seed(1)
    shapes = [(B, L, 3, 3), (B, S, 3), (B, L, 3)]
    u, z, w = (torch.randn(s, generator=r, dtype=torch.float64).requires_grad_() for s in shapes)
    return Index(u, z, w)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("L", "S"), [(63, 63), (17, 80), (1, 33)])
@pytest.mark.parametrize("kept", [1, 9, 100])
def test_is_its_definition(
    causal: bool, indexed: bool, L: int, S: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmlong.ops.best_keys.TILE_ELEMENTS", 512)
    monkeypatch.setattr("mmlong.ops.best_keys.LEAST", 5)
    leaves = given(3, 4, 2, L, S)
    index = indexer(3, L, S) if indexed else None
    got = best_keys_attention(*leaves, kept, causal=causal, index=index)
    want = best_keys_reference(*leaves, kept, causal=causal, index=index)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("indexed", [False, True])
def test_equal_keys_are_taken_in_their_order(indexed: bool) -> None:
    """Keys repeat, so that every score stands six times; forward and backward take the same."""
    q, k, v = given(1, 2, 2, 48, 48)
    k = k.detach()[:, :, :8].repeat(1, 1, 6, 1).requires_grad_()
    index = indexer(1, 48, 48)
    index = Index(index.queries, index.keys[:, :8].repeat(1, 6, 1), index.weights) if indexed else None
    got = best_keys_attention(q, k, v, 4, causal=True, index=index)
    want = best_keys_reference(q, k, v, 4, causal=True, index=index)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [q, k, v]) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_selection_passes_no_gradient_to_its_indexer() -> None:
    leaves, index = given(1, 2, 1, 20, 20), indexer(1, 20, 20)
    y = best_keys_attention(*leaves, 3, causal=True, index=index)
    found = torch.autograd.grad(y.sum(), [index.queries, index.keys, index.weights])
    assert not any(bool(g.any()) for g in found)


@pytest.mark.parametrize("kept", [None, 7])
def test_the_loss_of_an_indexer(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, query by query; in tiles."""
    monkeypatch.setattr("mmlong.ops.best_keys.TILE_ELEMENTS", 512)
    monkeypatch.setattr("mmlong.ops.best_keys.LEAST", 5)
    L = 40
    q, k, _ = given(2, 4, 2, L, L)
    index = indexer(2, L, L)
    got = indexer_loss(q, k, index, kept)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(L):
            by = torch.stack(
                [(index.weights[b, t] * (index.queries[b, t] @ index.keys[b, s]).relu()).sum() for s in range(t + 1)]
            )
            taken = by.detach().sort(dim=0, descending=True, stable=True).indices[:kept]
            p = torch.zeros(len(taken), dtype=torch.float64)
            for h in range(4):
                p += (q[b, h, t] @ k[b, h // 2, taken].T / math.sqrt(6)).softmax(-1).detach() / 4
            total = total + (p * (p.log() - by[taken].log_softmax(-1))).sum()
    torch.testing.assert_close(got, total / (2 * L))
    leaves = [index.queries, index.keys, index.weights]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(total / (2 * L), leaves), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.grad(indexer_loss(q, k, index, kept), [q, k], allow_unused=True) == (None, None)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = given(1, 4, 2, 9, 16)
    with pytest.raises(ValueError, match="G dividing H"):
        best_keys_attention(q[:, :3], k, v, 2, causal=True)
    with pytest.raises(ValueError, match="at least 1"):
        best_keys_attention(q, k, v, 0, causal=True)

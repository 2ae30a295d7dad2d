"""Hierarchical attention against its definition, in pieces, and against dense attention where the two must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.hierarchical_attention import (
    hierarchical_attention,
    hierarchical_attention_causal,
    hierarchical_attention_reference,
    kept,
    sampled,
)


def draw(L: int, B: int = 2, H: int = 2, D: int = 5) -> list[Tensor]:
    torch.manual_seed(L)
    return [torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool) -> Tensor:
    """Pair by pair, for one head ``(L, D)``: the level from the blocks' numbers, averages by splitting each cluster into its halves."""
    L, D = q.shape

    def average(t: Tensor, cluster: int, level: int) -> Tensor:
        if level == 0:
            return t[cluster]
        halves = [2 * cluster, 2 * cluster + 1]
        parts = [average(t, half, level - 1) for half in halves if half << (level - 1) < L]
        return torch.stack(parts).mean(0)

    rows = []
    for i in range(L):
        scores = []
        for j in range(i + 1 if causal else L):
            level = 0
            while abs((i >> level) // block - (j >> level) // block) > 1:
                level += 1
            query = q[i >> level << level] if causal else average(q, i >> level, level)
            scores.append(query @ average(k, j >> level, level) / D**0.5)
        rows.append(torch.stack(scores).softmax(0) @ v[: len(scores)])
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("L", "block"), [(1, 2), (13, 2), (32, 2), (39, 2), (41, 4), (64, 4)])
def test_definition_pair_by_pair(L: int, block: int, causal: bool) -> None:
    q, k, v = (t.detach() for t in draw(L, 1, 1))
    want = by_hand(q[0, 0], k[0, 0], v[0, 0], block, causal)
    torch.testing.assert_close(hierarchical_attention_reference(q, k, v, block, causal)[0, 0], want)


@pytest.mark.parametrize("block", [2, 4, 16])
@pytest.mark.parametrize("L", [1, 2, 5, 16, 31, 64, 127, 200, 257])
def test_both_forms_against_the_definition(L: int, block: int) -> None:
    leaves = draw(L)
    for causal in (True, False):
        want = hierarchical_attention_reference(*leaves, block, causal)
        got = hierarchical_attention_causal(*leaves, block)[0] if causal else hierarchical_attention(*leaves, block)
        torch.testing.assert_close(got, want)
        slope = torch.randn_like(want)
        for a, b in zip(torch.autograd.grad(got, leaves, slope), torch.autograd.grad(want, leaves, slope), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [[1] * 70, [7, 1, 1, 30, 2, 29], [33, 37]])
def test_pieces_and_what_is_kept(sizes: list[int]) -> None:
    q, k, v = (t.detach() for t in draw(sum(sizes)))
    whole, last = hierarchical_attention_causal(q, k, v, 2)
    state: Any = None
    past, outputs = 0, []
    for size in sizes:
        part = slice(past, past + size)
        y, state = hierarchical_attention_causal(q[:, :, part], k[:, :, part], v[:, :, part], 2, past, state)
        past += size
        outputs.append(y)
        assert state[0].shape[2] == sampled(past, 2)
        assert state[1].shape[2] == state[2].shape[2] == sum(stop - first for first, stop in kept(past, 2))
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b)


def test_state_is_logarithmic() -> None:
    for seen in (1 << 12, 1 << 20, (1 << 20) - 1):
        levels = seen.bit_length()
        assert sum(stop - first for first, stop in kept(seen, 16)) <= 32 * levels
        assert sampled(seen, 16) < levels


@pytest.mark.parametrize("causal", [True, False])
def test_dense_where_tokens_of_a_cluster_are_alike(causal: bool) -> None:
    """Nothing is seen twice or not at all, and clusters weigh as much as they have tokens."""
    L, block = 256, 4
    alike = L // block // 2  # tokens of a cluster of the highest level
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, L // alike, 8, dtype=torch.float64).repeat_interleave(alike, 2) for _ in range(2))
    v = torch.randn(2, 3, L, 8, dtype=torch.float64)
    got = hierarchical_attention_causal(q, k, v, block)[0] if causal else hierarchical_attention(q, k, v, block)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=causal))

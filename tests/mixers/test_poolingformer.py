"""Poolingformer against its definition, token by token; there is no package of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.ops.rotary import rotary_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer("poolingformer", dim, causal=False, **options).double()


def pooled(m: Any, u: Tensor, name: str) -> Tensor:
    """One pooled token after the other, over a list of the tokens that there are."""
    L, half = u.shape[1], m.kernel // 2
    found = []
    for middle in range(0, L, m.stride):
        there = [j for j in range(middle - half, middle + half + 1) if 0 <= j < L]
        if m.pool == "mean":
            found.append(u[:, there].mean(1))
        else:
            scores = getattr(m, name)(u[:, middle])[:, [j - middle + half for j in there]]
            found.append((scores.softmax(1)[..., None] * u[:, there]).sum(1))
    return torch.stack(found, 1)


def read(m: Any, q: Tensor, k: Tensor, v: Tensor, places: list[int], window: int) -> Tensor:
    """Of tokens ``q (B, L, C)`` over keys ``(B, S, C)`` at some places."""
    B, L, _ = q.shape
    q, k, v = (t.view(B, t.shape[1], m.heads, m.head_dim) for t in (q, k, v))
    if m.rope:
        q = rotary_reference(q, torch.arange(L), m.rope_base)
        k = rotary_reference(k, torch.tensor(places), m.rope_base)
    rows = []
    for i in range(L):
        seen = [n for n, j in enumerate(places) if abs(i - j) <= window]
        scores = (q[:, i, None] * k[:, seen]).sum(-1) / m.head_dim**0.5
        rows.append((scores.softmax(1)[..., None] * v[:, seen]).sum(1).flatten(1))
    return torch.stack(rows, 1)


def by_hand(m: Any, x: Tensor) -> Tensor:
    L = x.shape[1]
    near = read(m, m.q_proj(x), m.k_proj(x), m.v_proj(x), list(range(L)), m.window)
    keys, values = pooled(m, m.k2_proj(near), "k_pool"), pooled(m, m.v2_proj(near), "v_pool")
    far = read(m, m.q2_proj(near), keys, values, list(range(0, L, m.stride)), m.pooled_window)
    return m.out_proj(near + far)


CASES = [
    (37, {"window": 3, "pooled_window": 9, "rope": False}),
    (40, {"window": 2, "pooled_window": 10, "kernel": 3, "stride": 5, "pool": "mean", "bias": True}),
    (23, {"window": 5, "pooled_window": 2, "kernel": 7, "stride": 2}),
    (3, {"window": 1, "kernel": 1, "stride": 1}),
]


@pytest.mark.parametrize(("length", "options"), CASES)
@pytest.mark.oracle("definition: token by token", "poolingformer")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    m = build(12, heads=2, **options)
    x = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_hand(m, x), None))


def test_shortest_documents() -> None:
    m = build(8)
    for length in range(1, 7):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        torch.testing.assert_close(m(x)[0], by_hand(m, x))


def test_reach_is_both_windows() -> None:
    """A pooled key brings what lies a window and half a kernel beyond the second window."""
    m = build(8, heads=1, window=2, pooled_window=8, kernel=3, stride=4)
    x = torch.randn(1, 60, 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(m(x)[0][0, 20].sum(), x)
    seen = slope[0].abs().sum(-1).nonzero().flatten().tolist()
    assert (seen[0], seen[-1]) == (20 - 8 - 1 - 2, 20 + 8 + 1 + 2)


def test_impossible_options() -> None:
    for option in ("window", "kernel", "stride"):
        with pytest.raises(ValueError, match=f"Poolingformer: {option} must be at least 1, got 0"):
            create_mixer("poolingformer", 16, **{option: 0})
    for options, told in (
        ({"kernel": 4}, "kernel must be odd"),
        ({"pooled_window": 3}, "pooled_window 3 must be at least the stride 4"),
        ({"pool": "median"}, "pool must be one of dynamic, mean, got 'median'"),
        ({"causal": True}, "has no causal form"),
    ):
        with pytest.raises(ValueError, match=told):
            create_mixer("poolingformer", 16, **options)

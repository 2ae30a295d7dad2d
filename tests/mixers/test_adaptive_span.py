"""Adaptive attention span: against its formula with masks multiplied in, spans that keep what they promise, and their penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers.adaptive_span import AdaptiveSpan


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


@pytest.mark.parametrize("elements", [0, 1 << 30], ids=["tiles", "dense"])
@pytest.mark.parametrize("spans", [[0.0, 1.0], [0.13, 0.62], [0.0, 0.0]], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.oracle("definition: masks multiplied into the weights, float64", "adaptive_span")
def test_against_the_formula(
    same_as: Any, spans: list[float], kv_heads: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmlong.ops.attention_backends.MASK_ELEMENTS", elements)
    torch.manual_seed(0)
    B, L, dim, heads, most, ramp = 2, 150, 16, 2, 40, 7
    m = AdaptiveSpan(dim, heads=heads, kv_heads=kv_heads, max_span=most, ramp=ramp).double()
    with torch.no_grad():
        m.span.copy_(torch.tensor(spans))
    x = tokens(B, L, dim).requires_grad_()
    q = m.q_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (w(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2) for w in (m.k_proj, m.v_proj))
    kept = [k[:, :, -most:], v[:, :, -most:]]
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    d = torch.arange(L)[:, None] - torch.arange(L)
    places = m.places[d.clamp(0, most)]  # (L, L, head_dim)
    scores = q @ k.transpose(-1, -2) + torch.einsum("bhid,ijd->bhij", q, places)
    e = (scores / math.sqrt(dim // heads)).exp()
    mask = ((ramp + most * m.span[:, None, None] - d) / ramp).clamp(0, 1)
    e = e * mask * ((d >= 0) & (d <= most))
    want = m.out_proj((e / e.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    got, state = m(x)
    same_as(m, x, (got, [state["k"], state["v"]]), (want, kept), 1e-9)
    parts, state = [], None
    for piece in x.split([1, 30, 100, 19], 1):
        y, state = m(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_a_head_sees_as_far_as_its_span_and_the_ramp() -> None:
    m = AdaptiveSpan(8, heads=1, max_span=40, ramp=5, initial_span=0.25).double()
    x = tokens(1, 63, 8).requires_grad_()
    (seen,) = torch.autograd.grad(m(x)[0][0, 50].sum(), x)
    touched = seen[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(50 - 14, 51))  # 10 of the span, 4 of the ramp: at its end a key weighs nothing


def test_the_penalty_is_the_mean_span_and_training_keeps_spans_in_reach() -> None:
    m = AdaptiveSpan(16, heads=2, max_span=40)
    with torch.no_grad():
        m.span.copy_(torch.tensor([0.5, -0.3]))
    m.eval()
    assert m.spans().mean().item() == pytest.approx(10.0)
    m.train()
    loss = m.spans().mean()
    assert m.span.tolist() == [0.5, 0.0]
    loss.backward()
    assert m.span.grad is not None
    assert m.span.grad.tolist() == [20.0, 20.0]


def test_a_span_grows_where_that_helps() -> None:
    """A copy of the token 12 steps back, where the ramp ends: the head's span must reach it, from 0."""
    torch.manual_seed(0)
    m = AdaptiveSpan(8, heads=1, max_span=32, ramp=16)
    optimiser = torch.optim.Adam(m.parameters(), lr=0.02)
    for _ in range(80):
        x = torch.randn(4, 64, 8)
        loss = (m(x)[0][:, 12:] - x[:, :-12]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert m.spans().item() > 4.0


def test_options_are_checked() -> None:
    for options, message in (
        ({"max_span": 0}, "max_span 0 and ramp 32 must be at least 1"),
        ({"initial_span": 1.5}, r"share of max_span, in \[0, 1\], got 1.5"),
        ({"causal": False}, "is causal only"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveSpan(32, **options)

"""Expire-Span: against its formula, masks multiplied into the softmax; spans that keep what they promise; what has expired is not computed; and the penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.expire_span import ExpireSpan
from mmlong.mixers.own_loss import mean_own_loss, own_losses
from mmlong.ops import expiring_attention as op


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


def build(dim: int = 16, **options: Any) -> ExpireSpan:
    torch.manual_seed(0)
    m = ExpireSpan(dim, **{"heads": 2, "max_span": 40, "ramp": 7, "initial_span": 0.3, "near": 9, **options}).double()
    with torch.no_grad():
        # Spans of all lengths.
        m.span_proj.weight.normal_(std=1.5 / math.sqrt(dim))
    return m


def by_the_formula(m: ExpireSpan, x: Tensor) -> Tensor:
    L, H, G, d = x.shape[1], m.heads, m.kv_heads, m.head_dim
    q = m.q_proj(x).unflatten(-1, (H, d)).transpose(1, 2)
    k, v = (w(x).unflatten(-1, (G, d)).transpose(1, 2).repeat_interleave(H // G, 1) for w in (m.k_proj, m.v_proj))
    e = m.max_span * torch.sigmoid(m.span_proj(x)[..., 0])
    rows = []
    for i in range(L):
        distance = i - torch.arange(i + 1)
        places = torch.stack([m.places[n] if n < m.places.shape[0] else torch.zeros(d) for n in distance.tolist()])
        a = ((k[:, :, : i + 1] + places) @ q[:, :, i, :, None] / math.sqrt(d))[..., 0].softmax(-1)
        a = a * (1 + (e[:, None, : i + 1] - distance) / m.ramp).clamp(0, 1)
        a = a / a.sum(-1, keepdim=True)
        rows.append((a[:, :, None] @ v[:, :, : i + 1])[:, :, 0])
    return m.out_proj(torch.stack(rows, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("scores", "kv_heads", "near"), [(1, 1, 9), (1 << 11, 1, 9), (1 << 11, 2, 100), (1 << 20, 2, 1)]
)
@pytest.mark.oracle("definition: masks multiplied into the softmax, float64", "expire_span")
def test_against_the_formula(
    same_as: Any, scores: int, kv_heads: int, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "SCORES", scores)
    L, most = 63 if scores == 1 else 150, 46
    m = build(kv_heads=kv_heads, near=near)
    x = tokens(2, L, 16).requires_grad_()
    k, v = (w(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2)[:, :, -most:] for w in (m.k_proj, m.v_proj))
    got, state = m(x)
    e = m.spans(x)[:, None, -most:, None]
    same_as(m, x, (got, [state["k"], state["v"], state["span"]]), (by_the_formula(m, x), [k, v, e]), 1e-9)
    parts, state = [], None
    for piece in x.split([1, 30, L - 31], 1):
        y, state = m(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), got)


def test_a_memory_is_seen_as_long_as_it_says() -> None:
    m = build(dim=8, heads=1, near=1)
    x = tokens(1, 90, 8).requires_grad_()
    e = m.spans(x)[0].tolist()
    v = m.v_proj(x).detach().requires_grad_()
    for i in (40, 89):
        k, q = m.k_proj(x)[:, None], m.q_proj(x)[:, None]
        y = op.expiring_attention(
            q[:, :, : i + 1],
            k[:, :, : i + 1],
            v[:, None, : i + 1],
            m.spans(x)[:, : i + 1],
            m.places,
            op.Visible(46, 0),
            7,
        )
        (seen,) = torch.autograd.grad(y[0, 0, i].sum(), v)
        found = seen[0].abs().sum(-1).nonzero().flatten().tolist()
        assert found == [j for j in range(i + 1) if i - j < e[j] + 7]
        assert len(found) < 40


def test_what_has_expired_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token in eight is kept for long: its window of 1,000 keys costs an eighth."""
    monkeypatch.setattr(op, "QUERIES", 16)
    m = ExpireSpan(8, heads=1, max_span=1000, ramp=4, initial_span=0.5, near=1)
    x = tokens(2, 2000, 8, torch.float32)
    x[..., 0] = -1
    x[:, ::8, 0] = 1
    with torch.no_grad():
        m.span_proj.weight[0, 0] = 20.0
    want = m(x)[0]
    widths: list[int] = []
    plain = op._some

    def counting(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        widths.append(k.shape[2])
        return plain(q, k, *rest)

    monkeypatch.setattr(op, "_some", counting)
    got = m(x)[0]
    torch.testing.assert_close(got, want)
    assert max(widths) < 1000 // 8 + 30
    monkeypatch.setattr(op, "values_known", lambda: False)
    torch.testing.assert_close(m(x)[0], want)
    assert max(widths) > 1000


def test_the_penalty_is_the_mean_span_of_tokens_that_there_are() -> None:
    m = build(span_loss=0.01).train()
    x = tokens(2, 30, 16)
    with own_losses() as found:
        m(x, None, Layout(lengths=torch.tensor([30, 4])))
    e = m.spans(x)
    want = 0.01 * torch.cat([e[0], e[1, :4]]).mean()
    got = mean_own_loss(found)
    assert got is not None
    torch.testing.assert_close(got, want)
    (g,) = torch.autograd.grad(got, m.span_proj.bias)
    assert float(g) > 0
    with own_losses() as found:
        m.eval()(x)
    assert not found
    assert not build(span_loss=0.0).has_own_loss


def test_it_keeps_what_is_needed_and_lets_the_rest_go() -> None:
    """A marked token is asked for 24 tokens later; of the others none is."""
    torch.manual_seed(0)
    m = ExpireSpan(8, heads=1, max_span=64, ramp=16, initial_span=0.3, near=1, span_loss=0.004).train()
    optimiser = torch.optim.Adam(m.parameters(), lr=0.02)
    for _ in range(150):
        x = torch.randn(16, 48, 8)
        x[..., 0], x[..., 1] = 0, 0
        x[:, 16, 0] = 3
        x[:, 40, 1] = 3
        with own_losses() as found:
            y, _ = m(x)
        penalty = mean_own_loss(found)
        assert penalty is not None
        loss = (y[:, 40, 2:] - x[:, 16, 2:]).square().mean() + penalty
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    e = m.eval().spans(x).detach()
    # Beyond 24 - 16 tokens it is still there; the others, which began at 19, are on their way to nothing.
    assert float(e[:, 16].mean()) > 8
    assert float(e[:, 20:40].mean()) < 7


def test_options_are_checked() -> None:
    for options, message in (
        ({"max_span": 0}, "max_span 0, ramp 32 and near 256 must be at least 1"),
        ({"initial_span": 1.0}, r"share of max_span, in \(0, 1\), got 1.0"),
        ({"span_loss": -1.0}, "span_loss must be at least 0"),
        ({"causal": False}, "is causal only"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpireSpan(32, **options)

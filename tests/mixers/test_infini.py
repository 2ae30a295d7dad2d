"""Infini-attention against the paper's equations, token by token, and what its memory holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import InfiniAttention
from mmlong.ops.rotary import rotary_reference


def by_definition(m: InfiniAttention, x: Tensor) -> Tensor:
    """One document ``(T, D)``."""
    H, G, d = m.heads, m.kv_heads, m.head_dim
    q, k, v = m.q_proj(x).view(-1, H, d), m.k_proj(x).view(-1, G, d), m.v_proj(x).view(-1, G, d)
    places = torch.arange(x.shape[0])
    turned_q, turned_k = (rotary_reference(t, places, m.rope_base) for t in (q, k)) if m.rope else (q, k)

    def f(t: Tensor) -> Tensor:
        return torch.where(t > 0, t + 1, t.exp())

    rows = []
    for i in range(x.shape[0]):
        a, heads = i // m.segment * m.segment, []
        for h in range(H):
            g = h // (H // G)
            scores = turned_k[a : i + 1, g] @ turned_q[i, h] / math.sqrt(d)
            local = scores.softmax(0) @ v[a : i + 1, g]
            memory, total = torch.zeros(d, d, dtype=x.dtype), torch.zeros(d, dtype=x.dtype)
            for s in range(0, a, m.segment):
                fk, new = f(k[s : s + m.segment, g]), v[s : s + m.segment, g]
                if m.delta and s:
                    new = new - (fk @ memory) / (fk @ total)[:, None]
                memory, total = memory + fk.T @ new, total + fk.sum(0)
            known = f(q[i, h]) @ memory / (f(q[i, h]) @ total) if a else torch.zeros_like(local)
            gate = torch.sigmoid(m.gate[h])
            heads.append(gate * known + (1 - gate) * local)
        rows.append(torch.cat(heads))
    return m.out_proj(torch.stack(rows))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("length", "rope"), [(6, True), (27, True), (20, False)])
@pytest.mark.oracle("definition: the paper's equations", "infini_attention")
def test_is_its_definition(same_as: Any, length: int, rope: bool, delta: bool) -> None:
    torch.manual_seed(0)
    m = InfiniAttention(16, segment=6, heads=4, kv_heads=2, delta=delta, rope=rope).double()
    with torch.no_grad():
        m.gate.normal_()
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, x[0])[None], None))


def test_it_recalls_from_far_beyond_its_segment() -> None:
    """A pair that was seen once, sixteen segments ago: the softmax alone cannot know it."""
    torch.manual_seed(0)
    m = InfiniAttention(8, segment=4, heads=1)
    x = torch.randn(1, 80, 8, requires_grad=True)
    (g,) = torch.autograd.grad(m(x)[0][0, 70].sum(), x)
    assert bool((g[0, :71].abs().sum(-1) > 0).all())
    assert not bool(g[0, 71:].any())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        InfiniAttention(8, segment=0)

"""Forgetting attention: against fla's naive form with the same weights, and gates that are open or shut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers.attention import Attention
from mmlong.mixers.forgetting import ForgettingAttention


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


@pytest.fixture(params=["dense", "tiles"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that terms are computed on a CPU."""
    monkeypatch.setattr("mmlong.ops.attention_backends.MASK_ELEMENTS", 1 << 30 if request.param == "dense" else 0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.oracle("fla: naive_forgetting_attn", "forgetting_attention")
def test_against_fla(way: None, same_as: Any, kv_heads: int) -> None:
    naive = pytest.importorskip("fla.ops.forgetting_attn.naive")
    torch.manual_seed(0)
    B, L, dim, heads = 2, 150, 32, 4
    m = ForgettingAttention(dim, heads=heads, kv_heads=kv_heads).float()
    with torch.no_grad():
        m.f_proj.bias.normal_(mean=2.0)
    x = tokens(B, L, dim, torch.float32).requires_grad_()
    q = m.q_proj(x).unflatten(-1, (heads, -1))
    k, v = (w(x).unflatten(-1, (kv_heads, -1)) for w in (m.k_proj, m.v_proj))
    g = F.logsigmoid(m.f_proj(x))
    want = m.out_proj(naive.naive_forgetting_attn(q, k, v, g).flatten(2))
    kept = {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "g": g.transpose(1, 2)[..., None]}
    same_as(m, x, m(x), (want, kept), 2e-5)  # it sums in float32
    state, parts = None, []
    for piece in x.split([1, 40, 109], 1):
        y, state = m(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "gate": True, "positions": "rope"}], ids=["plain", "pro"])
@pytest.mark.oracle("definition: gates multiplied one by one, float64", "forgetting_attention")
def test_against_the_definition(way: None, same_as: Any, options: dict[str, Any]) -> None:
    """Weights are exp(q . k) times the product of the gates since the key, which is made pair by pair from products."""
    torch.manual_seed(0)
    B, L, dim, heads = 2, 40, 16, 2
    m = ForgettingAttention(dim, heads=heads, **options).double()
    x = tokens(B, L, dim).requires_grad_()
    q, k, v, g = m.project(x, torch.arange(L) if m.placed else None)
    kept = {"k": k, "v": v, "g": g}
    f = torch.sigmoid(m.f_proj(x)).transpose(1, 2)  # (B, heads, L)
    rows = []
    for i in range(L):
        product, weights = torch.ones(B, heads, dtype=x.dtype), []
        for j in range(i, -1, -1):
            weights.append(product * ((q[:, :, i] * k[:, :, j]).sum(-1) / (dim // heads) ** 0.5).exp())
            product = product * f[:, :, j]
        w = torch.stack(weights[::-1], -1)
        rows.append(((w / w.sum(-1, keepdim=True))[..., None] * v[:, :, : i + 1]).sum(2))
    read = torch.stack(rows, 2).transpose(1, 2).flatten(2)
    if m.gate_proj is not None:
        read = read * torch.sigmoid(m.gate_proj(x))
    same_as(m, x, m(x), (m.out_proj(read), kept), 1e-9)


def test_open_gates_are_attention_without_positions_and_shut_ones_see_their_own_key() -> None:
    torch.manual_seed(0)
    m = ForgettingAttention(16, heads=2).double()
    plain = Attention(16, heads=2, positions="none").double()
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("f_proj")})
    x = tokens(2, 70, 16)
    with torch.no_grad():
        m.f_proj.weight.zero_()
        m.f_proj.bias.fill_(60.0)
        torch.testing.assert_close(m(x)[0], plain(x)[0])
        m.f_proj.bias.fill_(-1e4)
        torch.testing.assert_close(m(x)[0], m.out_proj(m.v_proj(x)))


def test_gates_begin_without_a_bias() -> None:
    assert not ForgettingAttention(16, heads=2).f_proj.bias.any()

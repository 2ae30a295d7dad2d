"""Efficient attention and XCiT, whose matrices are as large as a head is wide, against other people's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

from mmlong.mixers import create_mixer


def build(name: str) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer(name, 24, causal=False, heads=3).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


@pytest.mark.parametrize("length", [31, 2])
@pytest.mark.oracle("linear-attention-transformer: linear_attn", "efficient_attention")
def test_efficient_attention(same_as: Any, length: int) -> None:
    """Theirs divides by the root of a head's width."""
    code = pytest.importorskip("linear_attention_transformer.linear_attention_transformer")
    m = build("efficient_attention")
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    y = 8**0.5 * code.linear_attn(q, k, v)
    same_as(m, x, m(x), (m.out_proj(y.transpose(1, 2).flatten(2)), None))


@pytest.mark.parametrize("length", [31, 2])
@pytest.mark.oracle("timm: XCA", "xcit")
def test_xcit(same_as: Any, length: int) -> None:
    code = pytest.importorskip("timm.models.xcit")
    m = build("xcit")
    theirs = code.XCA(24, num_heads=3).double()
    weights = {
        "qkv.weight": torch.cat([p.weight for p in (m.q_proj, m.k_proj, m.v_proj)]),
        "temperature": m.temperature[:, None, None],
        "proj.weight": m.out_proj.weight,
        "proj.bias": torch.zeros(24, dtype=torch.float64),
    }
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (functional_call(theirs, weights, (x,)), None))


def test_temperature_begins_at_one_and_does_not_decay() -> None:
    m: Any = create_mixer("xcit", 128, causal=False)
    assert m.temperature.tolist() == [1.0, 1.0]
    assert m.optim_hints["temperature"] == {"weight_decay": 0.0}


def test_impossible_options() -> None:
    for name in ("efficient_attention", "xcit"):
        with pytest.raises(ValueError, match=f"{name}: dim 24 does not divide into 5 heads"):
            create_mixer(name, 24, causal=False, heads=5)
        with pytest.raises(ValueError, match="no causal form"):
            create_mixer(name, 24, causal=True)

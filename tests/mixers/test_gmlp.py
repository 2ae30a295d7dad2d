"""gMLP against timm's block and the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes


def build(dim: int, **options: Any) -> Any:
    """Its matrix far from its initial zeros."""
    torch.manual_seed(0)
    m: Any = create_mixer("gmlp", dim, **options).double()
    with torch.no_grad():
        m.position_weight.normal_(std=0.3)
        m.position_bias.uniform_(0.5, 1.5)
    return m


def by_hand(m: Any, x: Tensor) -> Tensor:
    u, v = F.gelu(m.in_proj(x)).split(m.gate, -1)
    v = m.norm(v)
    L = x.shape[1]
    rows = []
    for i in range(L):
        last = i + 1 if m.causal else L
        mixed = sum(m.position_weight[i, j] * v[:, j] for j in range(last))
        rows.append(u[:, i] * (mixed + m.position_bias[i]))
    return m.out_proj(torch.stack(rows, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [13, 20])
@pytest.mark.oracle("definition: token by token", "gmlp")
def test_against_the_definition(same_as: Any, monkeypatch: pytest.MonkeyPatch, causal: bool, length: int) -> None:
    monkeypatch.setattr("mmlong.ops.position_mixing.ROWS", 6)
    m = build(6, causal=causal, expand=3, max_length=20)
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_hand(m, x), None))


@pytest.mark.oracle("timm: SpatialGatingBlock", "gmlp")
def test_against_timm(held: Any) -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    m = build(8, causal=False, max_length=24)
    theirs = timm.SpatialGatingBlock(8, 24, mlp_ratio=4).double().mlp_channels
    with torch.no_grad():
        theirs.fc1.load_state_dict(m.in_proj.state_dict())
        theirs.fc2.load_state_dict(m.out_proj.state_dict())
        theirs.gate.norm.load_state_dict(m.norm.state_dict())
        theirs.gate.proj.weight.copy_(m.position_weight)
        theirs.gate.proj.bias.copy_(m.position_bias)
    x = torch.randn(3, 24, 8, dtype=torch.float64, requires_grad=True)
    got, want = m(x)[0], theirs(x)
    held(x, (got, None), (want, None))
    torch.testing.assert_close(got, want)
    slope = torch.randn_like(got)
    a, b = (torch.autograd.grad(t, x, slope)[0] for t in (got, want))
    torch.testing.assert_close(a, b)


def test_an_mlp_at_the_start() -> None:
    m = create_mixer("gmlp", 8, max_length=64)
    assert float(m.position_weight.detach().std()) == pytest.approx(1e-6, rel=0.1)
    x = torch.randn(1, 64, 8)
    u = F.gelu(m.in_proj(x))[..., : m.gate]
    torch.testing.assert_close(m(x)[0], m.out_proj(u), atol=1e-3, rtol=0)


def test_state_bytes_and_the_longest_document() -> None:
    m = create_mixer("gmlp", 8, max_length=20)
    _, state = m(torch.randn(1, 13, 8))
    assert state_bytes(state) == m.state_bytes(13)
    with pytest.raises(ValueError, match="gmlp: a document of 21 tokens, but its matrix is made for max_length=20"):
        m(torch.randn(1, 8, 8), state)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="gmlp: expand 1 makes 7 channels, which do not halve"):
        create_mixer("gmlp", 7, expand=1)
    with pytest.raises(ValueError, match="gmlp: max_length must be at least 1, got 0"):
        create_mixer("gmlp", 8, max_length=0)

"""H-Transformer-1D against its definition, dense attention and h-transformer-1d."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.ops.hierarchical_attention import hierarchical_attention_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer("h_transformer", dim, **options).double()


def heads(m: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values without rope, ``(B, H, L, D)``."""
    return [p(x).unflatten(-1, (m.heads, -1)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [33, 200])
@pytest.mark.oracle("definition: the full matrix, pair by pair at its level", "h_transformer")
def test_against_the_definition(same_as: Any, causal: bool, length: int) -> None:
    m = build(24, causal=causal, heads=3, block=4, rope=False, bias=True)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    y = hierarchical_attention_reference(*heads(m, x), 4, causal)
    same_as(m, x, (m(x)[0], None), (m.leave(y), None))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("torch: scaled_dot_product_attention, tokens of a cluster alike", "h_transformer")
def test_against_dense_attention(same_as: Any, causal: bool) -> None:
    """Both as functions of one token of each cluster of the highest level."""
    m = build(16, causal=causal, heads=2, block=4, rope=False)
    each = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    x = each.repeat_interleave(16, 1)
    y = F.scaled_dot_product_attention(*heads(m, x), is_causal=causal)
    same_as(m, each, (m(x)[0], None), (m.leave(y), None))


def test_turned_before_averaging() -> None:
    """With rope it is the same on turned queries and keys; by the base class's projections, which are shared."""
    m = build(16, heads=2, block=2)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    q, k, v = m.project(x)
    torch.testing.assert_close(m(x)[0], m.leave(hierarchical_attention_reference(q, k, v, 2, True)))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """h-transformer-1d without the maxima that it subtracts level by level and does not make up for."""
    code = pytest.importorskip("h_transformer_1d.h_transformer_1d")

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def max(self, t: Tensor, dim: int, keepdim: bool) -> Any:
            return SimpleNamespace(values=torch.zeros_like(t.amax(dim, keepdim=keepdim)))

    monkeypatch.setattr(code, "torch", Torch())
    return code


@pytest.mark.oracle("h-transformer-1d: HAttention1D where its blocks make no difference", "h_transformer")
def test_against_h_transformer_1d(held: Any, package: Any) -> None:
    """Its two halves do not see each other: each is a sequence of ours. It takes siblings only, so blocks that are side by side but not siblings meet above the level at which ours do: where tokens are alike in the
    clusters of that level, that makes no difference. Its sums count a cluster as one; a channel of ones in the values counts its tokens. Averages of what is not alike, the far pairs, are compared."""
    block, L = 4, 64
    half = L // 2
    m = build(8, causal=False, heads=1, block=block, rope=False)
    torch.manual_seed(1)
    x = torch.randn(2, L, 8, dtype=torch.float64)
    x[..., -1] = 1
    # Blocks A B C D E F G H of each half: A and H are free, B and G alike in pairs, C to F in fours.
    for start in (0, half):
        for a, b, size in ((1, 2, 2), (2, 6, 4), (6, 7, 2)):
            part = slice(start + a * block, start + b * block)
            x[:, part] = x[:, part][:, ::size].repeat_interleave(size, 1)
    x.requires_grad_()
    with torch.no_grad():
        m.v_proj.weight.copy_(torch.eye(8))
        m.out_proj.weight.copy_(torch.eye(8))
    theirs = package.HAttention1D(8, heads=1, dim_head=8, block_size=block, eps=0.0).double()
    with torch.no_grad():
        theirs.to_qkv.weight.copy_(torch.cat([m.q_proj.weight, m.k_proj.weight, m.v_proj.weight]))
        theirs.to_out.weight.copy_(torch.eye(8))
        theirs.to_out.bias.zero_()
    z = theirs(x)
    want = z / z[..., -1:]
    got = torch.cat([m(part)[0] for part in x.split(half, 1)], 1)
    held(x.detach(), (got, None), (want, None))
    torch.testing.assert_close(got, want)
    # It is no accident of large clusters: with all tokens free the two differ.
    free = torch.randn(2, L, 8, dtype=torch.float64)
    free[..., -1] = 1
    z = theirs(free)
    apart = torch.cat([m(part)[0] for part in free.split(half, 1)], 1) - z / z[..., -1:]
    assert float(apart.detach().abs().max()) > 1e-3


def test_state_bytes() -> None:
    m = create_mixer("h_transformer", 16, heads=2, block=4)
    for length in (1, 4, 9, 100):
        _, state = m(torch.randn(1, length, 16))
        assert state_bytes(state) == m.state_bytes(length)
    assert m.state_bytes(1 << 20) < 2 * m.state_bytes(1 << 10) + 4096
    assert create_mixer("h_transformer", 16, causal=False).state_bytes(100) == 0


def test_impossible_options() -> None:
    for block in (0, 1, 5):
        with pytest.raises(ValueError, match=f"HTransformer: block must be even and at least 2, got {block}"):
            create_mixer("h_transformer", 16, block=block)
    with pytest.raises(ValueError, match="dim 16 does not divide into 3 heads"):
        create_mixer("h_transformer", 16, heads=3)

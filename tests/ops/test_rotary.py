"""Rotary positions against their definition, Llama's code, and what they are for."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops import rotary
from mmlong.ops.rotary import rotary_reference, rotary_table, rotate


@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
@pytest.mark.parametrize("rows", [False, True])
def test_against_definition(head_dim: int, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "BLOCK_ELEMENTS", 500)  # several blocks, the last one short
    x = torch.randn(3, 63, 2, head_dim, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 10**6, (3, 63)) if rows else torch.arange(5, 68)
    got = rotate(x, rotary_table(positions, head_dim, 10000.0, x.dtype))
    want = rotary_reference(x, positions)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    dy = torch.randn_like(want)
    gradients = (torch.autograd.grad(y, x, dy)[0] for y in (got, want))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_against_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0)
    positions = torch.arange(257)
    q, k = torch.randn(1, 257, 4, 16), torch.randn(1, 257, 4, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions[None])
    want = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    table = rotary_table(positions, 16, 10000.0, q.dtype)
    for mine, theirs in zip((q, k), want, strict=True):
        torch.testing.assert_close(rotate(mine, table).transpose(1, 2), theirs, rtol=1e-4, atol=1e-4)


def test_products_depend_on_the_distance_alone_a_million_tokens_out() -> None:
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def product(i: int, j: int) -> torch.Tensor:
        turned = (rotate(t, rotary_table(torch.tensor([p]), 64, 10000.0, t.dtype)) for t, p in ((q, i), (k, j)))
        return next(turned).mul(next(turned)).sum()

    torch.testing.assert_close(product(1_000_123, 1_000_100), product(23, 0), rtol=1e-4, atol=1e-4)


def test_gradcheck() -> None:
    x = torch.randn(2, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(5), 6, 100.0, x.dtype)
    assert torch.autograd.gradcheck(lambda t: rotate(t, table), (x,))
    assert torch.autograd.gradgradcheck(lambda t: rotate(t, table), (x,))


def test_bfloat16_is_kept() -> None:
    x = torch.randn(1, 9, 2, 8, dtype=torch.bfloat16)
    got = rotate(x, rotary_table(torch.arange(9), 8, 10000.0, x.dtype))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rotary_reference(x.float(), torch.arange(9)), rtol=2e-2, atol=2e-2)

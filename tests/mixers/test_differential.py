"""Differential attention: against transformers' DiffLlama with the same weights, its definition, and what its options promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers.differential import DiffAttention
from mmlong.ops.rotary import rotary_reference


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.oracle("transformers: DiffLlamaAttention", "diff_attention")
def test_against_diffllama(held: Any, kv_heads: int) -> None:
    theirs_ = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    torch.manual_seed(0)
    L, dim, heads = 63, 64, 4  # of theirs, which are single softmaxes
    width = dim // heads
    config = theirs_.DiffLlamaConfig(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5, rope_theta=10000.0
    )
    config._attn_implementation = "eager"
    theirs = theirs_.DiffLlamaAttention(config, layer_idx=2).eval()
    ours = DiffAttention(dim, heads=heads // 2, kv_heads=kv_heads // 2, lambda_init=theirs.lambda_init)

    def paired(weight: Tensor, many: int) -> Tensor:
        """Their first softmaxes stand before all the second ones."""
        return weight.view(2, many // 2, width, dim)

    with torch.no_grad():
        # Ours: of every group of keys the queries of its first key, and then those of its second.
        q = paired(theirs.q_proj.weight, heads).unflatten(1, (kv_heads // 2, -1)).transpose(0, 1)
        ours.q_proj.weight.copy_(q.reshape(-1, dim))
        ours.k_proj.weight.copy_(paired(theirs.k_proj.weight, kv_heads).transpose(0, 1).reshape(-1, dim))
        ours.v_proj.weight.copy_(paired(theirs.v_proj.weight, kv_heads).transpose(0, 1).reshape(-1, dim))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(ours, name).copy_(getattr(theirs, name))
    x = tokens(3, L, dim, torch.float32).requires_grad_()
    mask = torch.full((L, L), -math.inf).triu(1)[None, None]
    rotary = theirs_.DiffLlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
    want = theirs(x, position_embeddings=rotary, attention_mask=mask)[0]
    whole, state, parts = ours(x)[0], None, []
    for piece in x.split([1, 40, 22], 1):
        y, state = ours(piece, state)
        parts.append(y)
    held(x, (whole, None), (want, None))
    dy = torch.randn_like(want)
    for got in (whole, torch.cat(parts, 1)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        found, true = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (got, want))
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"heads": 1}, {"heads": 4, "kv_heads": 2}, {"heads": 2, "rope": False}], ids=str)
@pytest.mark.oracle("definition: two softmaxes, head by head", "diff_attention")
def test_against_the_definition(same_as: Any, causal: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    B, L, dim = 2, 300, 16
    m = DiffAttention(dim, causal=causal, lambda_init=0.4, **options).double()
    with torch.no_grad():
        m.norm.weight.normal_()
    x = tokens(B, L, dim).requires_grad_()
    h, g, d = m.heads, m.kv_heads, m.head_dim
    q = m.q_proj(x).view(B, L, g, 2, h // g, d)
    k, v = m.k_proj(x).view(B, L, g, 2, d), m.v_proj(x).view(B, L, g, 2 * d)
    if m.placed:
        q = rotary_reference(q.flatten(2, 4), torch.arange(L)).view(q.shape)
        k = rotary_reference(k.flatten(2, 3), torch.arange(L)).view(k.shape)
    kept = {"k": k.flatten(2, 3).transpose(1, 2), "v": v.transpose(1, 2)}
    share = (m.lambda_q1 @ m.lambda_k1).exp() - (m.lambda_q2 @ m.lambda_k2).exp() + 0.4
    mask = torch.full((L, L), -math.inf, dtype=x.dtype).triu(1) if causal else torch.zeros(L, L, dtype=x.dtype)
    read = []
    for n in range(h):
        of = n // (h // g)
        a, b = (
            (q[:, :, of, s, n % (h // g)] @ k[:, :, of, s].transpose(1, 2) / math.sqrt(d) + mask).softmax(-1)
            for s in range(2)
        )
        y = (a - share * b) @ v[:, :, of]
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        read.append(0.6 * y)
    same_as(m, x, m(x), (m.out_proj(torch.cat(read, -1)), kept if causal else None), 1e-8)


def test_lambda_begins_near_its_initial_value() -> None:
    torch.manual_seed(0)
    found = torch.stack([DiffAttention(64, lambda_init=0.3).lambda_() for _ in range(200)])
    assert abs(float(found.mean()) - 0.3) < 0.03
    assert 0.03 < float(found.std()) < 0.3


def test_sizes_and_options() -> None:
    m = DiffAttention(256)
    assert (m.heads, m.kv_heads, m.head_dim) == (2, 2, 64)
    assert DiffAttention(96, heads=4, head_dim=5).head_dim == 5
    for options, message in (
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"heads": 32}, "32 heads of two queries"),
        ({"lambda_init": 1.0}, r"lambda_init must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffAttention(32, **options)

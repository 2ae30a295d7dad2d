"""Multi-head latent attention: against transformers' DeepSeek-V3 with the same weights, both ways of reading the cache, and its size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers.latent import LatentAttention
from mmlong.mixers.state import state_bytes
from mmlong.ops.visible import Visible


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.oracle("transformers: DeepseekV3Attention", "mla")
def test_against_deepseek(held: Any, q_rank: int | None) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    L, dim, heads = 63, 32, 4
    config = deepseek.DeepseekV3Config(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=q_rank, kv_lora_rank=20,
        qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10, rope_interleave=False, num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = deepseek.DeepseekV3Attention(config, layer_idx=0).eval()
    ours = LatentAttention(dim, heads=heads, nope_dim=8, rope_dim=6, v_dim=10, kv_rank=20, q_rank=q_rank)
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_proj": "kv_b_proj", "out_proj": "o_proj"}
    down = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_proj": "q_b_proj"}
    with torch.no_grad():
        for norm in (theirs.kv_a_layernorm, *(() if q_rank is None else (theirs.q_a_layernorm,))):
            norm.weight.normal_()
    for mine, their in {**names, **({"q_proj": "q_proj"} if q_rank is None else down)}.items():
        getattr(ours, mine).load_state_dict(getattr(theirs, their).state_dict())
    x = tokens(3, L, dim, torch.float32).requires_grad_()
    mask = torch.full((L, L), -math.inf).triu(1)[None, None]
    rotary = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.arange(L)[None])
    cache = transformers.DynamicCache(config=config)
    want = theirs(x, position_embeddings=rotary, attention_mask=mask, cache=cache)[0]
    kept = {"c": cache.layers[0].keys, "r": cache.layers[0].values}
    whole, pieces = in_pieces(ours, x, [L]), in_pieces(ours, x, [1, 40, 22])
    held(x, whole, (want, kept))
    held(x, pieces, (want, kept))
    dy = torch.randn_like(want)
    for got, _ in (whole, pieces):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        found, true = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (got, want))
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def in_pieces(m: LatentAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    state, parts = None, []
    for piece in x.split(sizes, 1):
        y, state = m(piece, state)
        parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("v_dim", [3, 8, 20])
@pytest.mark.parametrize("L", [1, 70])
def test_both_ways_of_reading_the_cache_agree(v_dim: int, L: int) -> None:
    torch.manual_seed(0)
    m = LatentAttention(16, heads=2, v_dim=v_dim).double()
    x = tokens(2, 70, 16)
    q, c, r = m.project(x, torch.arange(70))
    visible = Visible(None, 0)
    a, b = m.absorbed(q[:, :, -L:], c, r, visible), m.expanded(q[:, :, -L:], c, r, visible)
    torch.testing.assert_close(a, b)
    for got, want in zip(*(torch.autograd.grad(t.sum(), m.kv_proj.weight) for t in (a, b)), strict=True):
        torch.testing.assert_close(got, want)


def test_few_queries_are_taken_to_the_cache() -> None:
    m = LatentAttention(256)
    assert (m.heads, m.nope_dim, m.rope_dim, m.v_dim, m.kv_rank) == (4, 64, 32, 64, 256)
    assert m.few(1)
    assert not m.few(4096)


def test_the_state_is_of_latents_whatever_the_heads() -> None:
    for heads in (1, 4):
        m = LatentAttention(32, heads=heads, kv_rank=12, rope_dim=4)
        _, state = m(tokens(3, 63, 32, torch.float32))
        assert state_bytes(state) == 3 * m.state_bytes(63) == 3 * 63 * 4 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_dim": 5}, "rope_dim must be even and at least 2, got 5"),
        ({"kv_rank": 0}, "kv_rank 0 .* must be at least 1"),
        ({"heads": 3}, "does not divide into 3 heads"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentAttention(32, **options)

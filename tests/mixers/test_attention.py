"""The attention mixer: against its definition, Llama's attention with the same weights, and what its options promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.attention import Attention, head_sizes
from mmlong.mixers.state import state_bytes
from mmlong.ops.backends import BackendError
from mmlong.ops.rotary import rotary_reference

BASE = 10000.0


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


def by_definition(mixer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax under an explicit mask, positions from 0; and turned keys and values."""
    L = x.shape[1]
    q = mixer.q_proj(x).unflatten(-1, (mixer.heads, mixer.head_dim))
    k, v = (w(x).unflatten(-1, (mixer.kv_heads, mixer.head_dim)) for w in (mixer.k_proj, mixer.v_proj))
    if mixer.placed:
        q, k = (rotary_reference(t, torch.arange(L), BASE) for t in (q, k))
    repeat = mixer.heads // mixer.kv_heads
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = q.transpose(1, 2), *(t.repeat_interleave(repeat, 1) for t in (keys, values))
    scores = q @ k.transpose(-1, -2) / math.sqrt(mixer.head_dim)
    if mixer.causal:
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    return mixer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), keys, values


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "kv_heads": 2}, {"heads": 2, "head_dim": 7, "positions": "none"}], ids=str
)
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 63), (1, 257)])
@pytest.mark.oracle("definition: softmax under a mask", "attention")
def test_against_the_definition(held: Any, causal: bool, options: dict[str, Any], B: int, L: int) -> None:
    torch.manual_seed(0)
    mixer = Attention(32, causal=causal, **options).double()
    x = tokens(B, L, 32).requires_grad_()
    (want, *kept), (got, state) = by_definition(mixer, x), mixer(x)
    held(x, (got, state), (want, kept if causal else None))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    dy, leaves = torch.randn_like(want), [x, *mixer.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.oracle("transformers: LlamaAttention", "attention")
def test_against_llama(held: Any, kv_heads: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    transformers = pytest.importorskip("transformers")
    L, dim = 63, 64
    torch.manual_seed(0)
    config = llama.LlamaConfig(
        hidden_size=dim, num_attention_heads=4, num_key_value_heads=kv_heads, rope_theta=10000.0, attention_bias=False
    )
    config._attn_implementation = "eager"
    theirs = llama.LlamaAttention(config, layer_idx=0).eval()
    ours = Attention(dim, heads=4, kv_heads=kv_heads)
    for a, b in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
        getattr(ours, a).load_state_dict(getattr(theirs, b).state_dict())
    x = tokens(3, L, dim, torch.float32).requires_grad_()
    mask = torch.full((L, L), -math.inf).triu(1)[None, None]
    rotary = llama.LlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
    cache = transformers.DynamicCache(config=config)
    want = theirs(x, position_embeddings=rotary, attention_mask=mask, past_key_values=cache)[0]
    state, parts = None, []
    for piece in x.split([1, 40, 22], 1):
        y, state = ours(piece, state)
        parts.append(y)
    held(x, (torch.cat(parts, 1), state), (want, [cache.layers[0].keys, cache.layers[0].values]))
    dy = torch.randn_like(want)
    for got in (ours(x)[0], torch.cat(parts, 1)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        found, true = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (got, want))
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def test_a_reset_forgets_keys_and_positions() -> None:
    torch.manual_seed(0)
    mixer = Attention(16, heads=2).double()
    x = tokens(2, 40, 16)
    resets = torch.zeros(2, 40, dtype=torch.bool)
    resets[0, 25] = True
    y, state = mixer(x, layout=Layout(lengths=torch.tensor([40, 0]), resets=resets))
    torch.testing.assert_close(y[:1, 25:], mixer(x[:1, 25:])[0])
    assert state["count"].tolist() == [15, 0]
    assert state["k"].shape[2] == 15, "keys that no document reaches are kept"
    after, _ = mixer(x[:, :9], state)
    torch.testing.assert_close(after[0], mixer(torch.cat([x[:1, 25:], x[:1, :9]], 1))[0][0, 15:])
    torch.testing.assert_close(after[1], mixer(x[1:, :9])[0][0])


def test_full_rows_keep_no_counts_and_state_bytes_are_exact() -> None:
    mixer = Attention(32, heads=4, kv_heads=2)
    _, state = mixer(tokens(3, 63, 32, torch.float32))
    assert set(state) == {"k", "v"}
    assert state_bytes(state) == 3 * mixer.state_bytes(63) == 3 * 2 * 2 * 8 * 63 * 4


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((256, None, None, None), (4, 4, 64)),
        ((16, None, None, None), (1, 1, 16)),
        ((96, 6, 2, None), (6, 2, 16)),
        ((256, None, 2, None), (4, 2, 64)),
        ((100, None, None, 32), (3, 3, 32)),
        ((48, None, 3, None), (3, 3, 16)),
    ],
)
def test_sizes_are_derived(given: tuple[int, int | None, int | None, int | None], found: tuple[int, int, int]) -> None:
    assert head_sizes("attention", *given) == found


def test_options_are_checked() -> None:
    for options, message in (
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"heads": 4, "kv_heads": 3}, "4 heads do not divide into 3 groups"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(32, **options)
    with pytest.raises(BackendError, match="attention has no backend 'flash'"):
        Attention(32, backend="flash")


def test_dropout_drops_in_training_only() -> None:
    torch.manual_seed(0)
    x = tokens(1, 63, 32)
    mixer, plain = (Attention(32, dropout=p).double() for p in (0.5, 0.0))
    plain.load_state_dict(mixer.state_dict())
    assert not torch.allclose(mixer(x)[0], plain(x)[0])
    torch.testing.assert_close(mixer.eval()(x)[0], plain(x)[0])

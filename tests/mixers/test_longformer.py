"""Longformer against transformers' attention with the same weights, dilation against softmax under an explicit mask, and its options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mmlong.layout import Layout
from mmlong.mixers import create_mixer
from mmlong.ops.rotary import rotary_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("longformer", dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def theirs(m: Any, x: Tensor, lengths: list[int]) -> Tensor:
    """transformers' ``LongformerSelfAttention`` with our parameters in it, and our last projection after it."""
    code = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = code.LongformerConfig(
        hidden_size=m.dim,
        num_attention_heads=m.heads,
        attention_window=[2 * m.window],
        attention_probs_dropout_prob=0.0,
    )
    module = code.LongformerSelfAttention(config, layer_id=0).to(x.dtype)
    weights = {}
    named = [("query", m.q_proj), ("key", m.k_proj), ("value", m.v_proj)]
    if m.globals:
        named += [("query_global", m.q_global), ("key_global", m.k_global), ("value_global", m.v_global)]
    for name, mine in named:
        # A bias of keys adds the same to all scores of a query.
        bias = torch.randn(m.dim, dtype=x.dtype) if mine.bias is None else mine.bias
        weights |= {f"{name}.weight": mine.weight, f"{name}.bias": bias}
    L = x.shape[1]
    filled = F.pad(x, (0, 0, 0, -L % (2 * m.window)))
    place = torch.arange(filled.shape[1])
    hidden = place >= torch.tensor(lengths)[:, None]
    is_global = (place < m.globals) & ~hidden
    mask = torch.where(hidden, -10000.0, torch.where(is_global, 10000.0, 0.0)).to(x.dtype)
    given = {
        "attention_mask": mask,
        "is_index_masked": hidden,
        "is_index_global_attn": is_global,
        "is_global_attn": bool(m.globals),
    }
    return m.out_proj(functional_call(module, weights, (filled,), given)[0][:, :L])


@pytest.mark.parametrize(("length", "window", "tokens"), [(96, 8, 0), (97, 8, 1), (150, 5, 3), (31, 40, 2)])
@pytest.mark.oracle("transformers: LongformerSelfAttention", "longformer")
def test_against_transformers(same_as: Any, length: int, window: int, tokens: int) -> None:
    m = build(24, causal=False, heads=3, window=window, globals=tokens, rope=False, bias=True)
    m.k_proj.register_parameter("bias", None)  # without positions its gradient is zero
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    # Their softmax is in float32.
    same_as(m, x, m(x), (theirs(m, x, [length] * 2), None), 2e-6)


def test_padding_against_transformers() -> None:
    m = build(24, causal=False, heads=3, window=8, globals=2, rope=False, bias=True)
    x = torch.randn(3, 64, 24, dtype=torch.float64)
    lengths = [64, 40, 9]
    got, want = m(x, None, Layout(lengths=torch.tensor(lengths)))[0], theirs(m, x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, :length], want[row, :length], rtol=1e-5, atol=1e-5)


def by_definition(m: Any, x: Tensor) -> Tensor:
    """Dense softmax of every head under a mask that is drawn pair by pair."""
    T, g = x.shape[1], m.globals
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(T), m.rope_base) for t in (q, k))
    seen = torch.zeros(m.heads, T, T, dtype=torch.bool)
    for h, d in enumerate(m.dilation):
        for i in range(T):
            for n in range(-m.window, 1 if m.causal else m.window + 1):
                if 0 <= i + d * n < T:
                    seen[h, i, i + d * n] = True
    seen[:, :, :g] = True
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(m.head_dim)
    y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    if g:
        q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_global, m.k_global, m.v_global))
        weights = (torch.einsum("bihd,bjhd->bhij", q[:, :g], k) / math.sqrt(m.head_dim)).softmax(-1)
        y = torch.cat([torch.einsum("bhij,bjhd->bihd", weights, v)[:, : min(g, T)], y[:, g:]], 1)
    return m.out_proj(y.flatten(2))


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (150, {"window": 5, "dilation": [1, 1, 4], "rope": False}),
        (97, {"window": 7, "dilation": [3, 1, 2], "bias": True}),
        (20, {"window": 2, "dilation": 9}),
        (150, {"causal": False, "window": 5, "dilation": [1, 6, 6], "globals": 3}),
        (61, {"causal": False, "window": 3, "dilation": 4, "globals": 0}),
        (2, {"causal": False, "globals": 5}),
    ],
)
@pytest.mark.oracle("definition: softmax under a mask", "longformer")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    m = build(24, heads=3, **options)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    got, want = m(x)[0], by_definition(m, x)
    if length <= m.globals:
        # No token has a window: its projections are not used by one side, and for nothing by the other.
        torch.testing.assert_close(got, want)
        same_as(torch.nn.Module(), x, (got, None), (want, None))
    else:
        same_as(m, x, (got, None), (want, None))


def test_the_window_is_that_of_xformers() -> None:
    """Who sees whom, from the Jacobian, beside the mask of its local attention."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    m = build(8, causal=False, heads=1, window=3, globals=0)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: m(t)[0].sum((0, 2)), x)[:, 0]
    seen = jacobian.abs().sum(-1) > 0
    local = bias.LocalAttentionFromBottomRightMask(window_left=3, window_right=3)
    assert torch.equal(seen, local.materialize((20, 20)) == 0)


def test_a_state_does_not_grow() -> None:
    m = build(16, heads=2, window=4, dilation=[1, 3])
    _, state = m(torch.randn(2, 50, 16, dtype=torch.float64))
    assert state["k"].shape == (2, 2, 12, 8)
    assert m.state_bytes(5) == 2 * 4 * 16 * 5
    assert m.state_bytes(10**6) == 2 * 4 * 16 * 12


def test_global_tokens_by_default() -> None:
    assert create_mixer("longformer", 16, causal=False).globals == 1
    assert create_mixer("longformer", 16).globals == 0


def test_impossible_options() -> None:
    for options, message in (
        ({"window": 0}, "Longformer: window must be at least 1"),
        ({"dilation": [1, 2], "heads": 4}, "one for each of the 4 heads"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"globals": 2}, "a causal one has no global tokens"),
        ({"globals": -1, "causal": False}, "globals must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("longformer", 16, **options)

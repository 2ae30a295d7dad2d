"""The local mixer: against its definition, transformers' Longformer with the same weights, and a state that does not grow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.local import Local
from mmlong.mixers.state import state_bytes
from mmlong.ops.rotary import rotary_reference

BASE = 10000.0


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


def by_definition(mixer: Local, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Softmax under an explicit band; and the last keys and values, after as many zeros as are missing, and how many there have been."""
    L, window = x.shape[1], mixer.window
    assert window is not None
    q, k, v = (w(x).unflatten(-1, (mixer.heads, -1)) for w in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.placed:
        q, k = (rotary_reference(t, torch.arange(L), BASE) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(L)[:, None] - torch.arange(L)
    hidden = (distance > window) | (distance < (0 if mixer.causal else -window))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(mixer.head_dim)).masked_fill(hidden, -math.inf)
    kept = [F.pad(t, (0, 0, window, 0))[:, :, -window:] for t in (k, v)]
    y = mixer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return y, [*kept, torch.full(x.shape[:1], L)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["auto", "tiled", "blocks"])
@pytest.mark.parametrize(
    ("window", "L", "positions"), [(1, 63, "rope"), (10, 257, "rope"), (10, 63, "none"), (300, 63, "rope")]
)
@pytest.mark.oracle("definition: softmax under a band", "local")
def test_against_the_definition(held: Any, causal: bool, backend: str, window: int, L: int, positions: str) -> None:
    if backend == "blocks" and window >= L:
        backend = "sdpa"
    torch.manual_seed(0)
    mixer = Local(16, causal=causal, window=window, heads=2, positions=positions, backend=backend).double()
    x = tokens(3, L, 16).requires_grad_()
    (want, kept), (got, state) = by_definition(mixer, x), mixer(x)
    held(x, (got, state), (want, kept if causal else None))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    dy, leaves = torch.randn_like(want), [x, *mixer.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lengths", [None, [96, 50, 1]])
@pytest.mark.oracle("transformers: LongformerSelfAttention", "local")
def test_against_longformer(held: Any, lengths: list[int] | None) -> None:
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    dim, heads, window, L = 32, 4, 8, 96
    torch.manual_seed(0)
    config = longformer.LongformerConfig(
        hidden_size=dim, num_attention_heads=heads, attention_window=[2 * window], attention_probs_dropout_prob=0.0
    )
    theirs = longformer.LongformerSelfAttention(config, layer_id=0).eval()
    ours = Local(dim, causal=False, window=window, heads=heads, positions="none", bias=True)
    with torch.no_grad():
        for mine, their in ((ours.q_proj, theirs.query), (ours.k_proj, theirs.key), (ours.v_proj, theirs.value)):
            mine.load_state_dict(their.state_dict())
        ours.out_proj.weight.copy_(torch.eye(dim))
        ours.out_proj.bias.zero_()
    x = tokens(3, L, dim, torch.float32).requires_grad_()
    valid = torch.arange(L) < torch.tensor(lengths or [L] * 3)[:, None]
    hidden = ~valid
    want = theirs(
        x,
        attention_mask=hidden * -10000.0,
        is_index_masked=hidden,
        is_index_global_attn=torch.zeros_like(hidden),
        is_global_attn=False,
    )[0]
    got, _ = ours(x, layout=None if lengths is None else Layout(lengths=torch.tensor(lengths)))
    held(x, (got[valid], None), (want[valid], None))
    torch.testing.assert_close(got[valid], want[valid], rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(want) * valid[..., None]
    found, true = (torch.autograd.grad(y, x, dy)[0] for y in (got, want))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 9, 63, 257])
def test_the_state_is_of_one_size(length: int) -> None:
    mixer = Local(16, window=10, heads=2)
    _, state = mixer(tokens(3, length, 16, torch.float32))
    assert state["k"].shape == state["v"].shape == (3, 2, 10, 8)
    assert state["count"].tolist() == [length] * 3
    assert state_bytes(state) == 3 * mixer.state_bytes(length) == 3 * (2 * 10 * 16 * 4 + 8)


def test_what_lies_beyond_the_window_has_no_effect() -> None:
    mixer = Local(16, window=10).double()
    x = tokens(1, 63, 16).requires_grad_()
    (seen,) = torch.autograd.grad(mixer(x)[0][0, 40].sum(), x)
    touched = seen[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(30, 41))


def test_positions_go_on_long_after_the_window_has_filled() -> None:
    torch.manual_seed(0)
    mixer = Local(16, window=4, heads=2).double()
    x = tokens(2, 63, 16)
    whole, state, parts = mixer(x)[0], None, []
    for piece in x.split([3, 1, 30, 2, 27], 1):
        y, state = mixer(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_window_must_see_something() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Local(16, window=0)

"""Mega against its formulas, token by token in float64, each function of scores, one side and both; and its average against scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import Mega, create_mixer, state_bytes
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer


def mixer(dim: int, **options: Any) -> Mega:
    torch.manual_seed(0)
    made = create_mixer("mega", dim, **options).double()
    assert isinstance(made, Mega)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))  # scores and biases that matter
    return made


def definition(m: Mega, x: Tensor) -> tuple[Tensor, Tensor]:
    """The file's opening lines: averages by their recurrences, the attention one query at a time; and what the states of that of the past are at the end."""
    D = x.shape[2]
    if not m.causal:
        past, future = (one_way(m, rows, y) for rows, y in ((slice(0, D), x), (slice(D, None), x.flip(1))))
        return after_average(m, x, past[0] + future[0].flip(1)), past[1]
    e, state = one_way(m, slice(None), x)
    return after_average(m, x, e), state


def one_way(m: Mega, rows: slice, x: Tensor) -> tuple[Tensor, Tensor]:
    """One average and its states."""
    B, L, D = x.shape
    p = torch.sigmoid(m.delta[rows])
    q = 1 - p * torch.sigmoid(m.alpha[rows])
    state, e = x.new_zeros(B, D, m.ema_dim), []
    for t in range(L):
        state = q * state + p * m.beta[rows] * x[:, t, :, None]
        e.append((state * m.gamma[rows]).sum(-1) / math.sqrt(m.ema_dim))
    return torch.stack(e, 1), state / (p * m.beta[rows])


def after_average(m: Mega, x: Tensor, e: Tensor) -> Tensor:
    """The layer's output."""
    L, D = x.shape[1:]
    mixed = F.silu(e + m.omega * x)
    u, z, r, c = m.m_proj(mixed).split([D, m.qk_dim, m.value_dim, D], -1)
    z, r, v = F.silu(z), F.silu(r), F.silu(m.v_proj(x))
    queries, keys = (z * m.qk_scale[i] + m.qk_offset[i] for i in range(2))
    turned = [rotary_reference(t.expand(1, L, 1, -1), torch.arange(L))[0, :, 0] for t in m.relative]
    rows = []
    for i in range(L):
        first = i - i % m.chunk
        seen = slice(first, i + 1 if m.causal else min(first + m.chunk, L))
        scores, bias = (queries[:, i, None] * keys[:, seen]).sum(-1), turned[1][seen] @ turned[0][i]
        if m.attention == "softmax":
            weights = (scores / math.sqrt(m.qk_dim) + bias).softmax(-1)
        else:
            # The normal distribution's share below a score, of the paper's mean and deviation.
            mean, deviation = torch.tensor([0.5, 1 / (4 * math.pi)], dtype=x.dtype).sqrt()
            normal = torch.distributions.Normal(mean, deviation)
            weights = normal.cdf(scores / len(bias) + bias)
        rows.append((weights[..., None] * v[:, seen]).sum(1))
    h = F.silu(c + m.h_proj(r * torch.stack(rows, 1)))
    return torch.sigmoid(u) * h + (1 - torch.sigmoid(u)) * x


@pytest.mark.parametrize(
    ("dim", "length", "options"),
    [
        (6, 63, {"chunk": 16}),
        (4, 257, {"chunk": 7, "ema_dim": 3, "qk_dim": 6, "value_dim": 5}),
        (6, 63, {"chunk": 16, "attention": "laplace"}),
        (4, 200, {"chunk": 100, "ema_dim": 3, "attention": "laplace"}),
        (6, 63, {"chunk": 16, "causal": False}),
        (4, 130, {"chunk": 50, "ema_dim": 3, "attention": "laplace", "causal": False}),
    ],
)
@pytest.mark.oracle("definition: token by token", "mega")
def test_against_the_definition(held: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    (y, state), (want, ema) = m(x), definition(m, x)
    if m.causal:
        held(x, (y, state["ema"][..., 0]), (want, ema))
        torch.testing.assert_close(state["ema"][..., 0], ema, rtol=1e-10, atol=1e-10)
    else:
        held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(want), [x, *m.parameters()]
    mine, theirs = (torch.autograd.grad(t, leaves, dy) for t in (y, want))
    for key, a, b in zip(["x", *[n for n, _ in m.named_parameters()]], mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda t, k=key: f"{k}: {t}")


@torch.no_grad()
def test_the_average_is_a_sum_of_filters_of_scipy() -> None:
    m = mixer(3, ema_dim=4)
    x = torch.randn(2, 150, 3, dtype=torch.float64)
    p = torch.sigmoid(m.delta).numpy()
    q = 1 - p / (1 + np.exp(-m.alpha.numpy()))
    gain = p * (m.beta * m.gamma).numpy() / 2
    want = np.zeros((2, 150, 3))
    for d in range(3):
        for n in range(4):
            want[..., d] += scipy.signal.lfilter([gain[d, n]], [1, -q[d, n]], x[..., d].numpy(), axis=1)
    np.testing.assert_allclose(m.average(x, None, None)[0].numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_but_the_average_crosses_a_chunk(attention: str, causal: bool) -> None:
    """With an average that forgets at once, a token sees its own chunk alone."""
    m = mixer(4, chunk=8, attention=attention, causal=causal)
    with torch.no_grad():
        m.gamma.zero_()
    x = torch.randn(1, 32, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(m(x)[0][0, 19].sum(), x)
    seen = slope[0].abs().sum(-1) > 0
    assert seen.nonzero()[:, 0].tolist() == list(range(16, 20 if causal else 24))


@pytest.mark.parametrize("prop", ["pieces", "padding", "resets", "gradients", "bfloat16", "finite", "cost"])
@pytest.mark.parametrize("causal", [True, False])
def test_laplace_attention_keeps_the_contract(causal: bool, prop: str) -> None:
    """The conformance suite sees softmax."""
    options = {"attention": "laplace", "causal": causal, "chunk": 16, "ema_dim": 3}
    assert check_mixer("mega", options=options, only=prop, dims=(16,)) or (prop == "pieces" and not causal)


def test_initial_values() -> None:
    torch.manual_seed(0)
    m = Mega(256).requires_grad_(False)
    assert abs(float(m.delta.std()) - 0.2) < 0.01
    torch.testing.assert_close(m.beta.mean(0), torch.tensor([1.0, -1.0]).repeat(8), rtol=0, atol=0.01)
    assert abs(float(m.gamma.std()) - 1) < 0.05
    assert abs(float(m.m_proj.weight.std()) - 0.02) < 0.001
    assert abs(float(m.qk_scale.std()) - 0.02) < 0.005


def test_state_bytes_and_impossible_options() -> None:
    for dim in (1, 3, 16):
        m = create_mixer("mega", dim, chunk=5)
        for length in (1, 3, 12):
            assert state_bytes(m(torch.randn(1, length, dim))[1]) == m.state_bytes(length)
    with pytest.raises(ValueError, match="chunk 1"):
        create_mixer("mega", 8, chunk=1)
    assert create_mixer("mega", 8, causal=False).state_bytes(100) == 0
    with pytest.raises(ValueError, match="unknown attention 'relu'"):
        create_mixer("mega", 8, attention="relu")
    with pytest.raises(ValueError, match="ema_dim 0"):
        create_mixer("mega", 8, ema_dim=0)

"""Titans' memory against fla's gated delta rule where it is one, fla's coefficients of momentum and decay, and its definition by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.titans import Titans
from mmlong.ops.descent_steps import momentum_steps
from mmlong.ops.test_time import EPS, Memory, Norm
from mmlong.ops.test_time_reference import descend_with_momentum_reference
from mmlong.testing import check_mixer


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Titans:
    """Away from the initial values, and with rates at which the network learns something."""
    torch.manual_seed(0)
    m = create_mixer("titans", dim, **{"max_rate": 0.3, **options}).to(dtype)
    assert isinstance(m, Titans)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


Inner = Callable[..., tuple[Tensor, Any]]
"""``(q, k, v, theta, alpha, eta) -> (f(q), state)``; tokens ``(B, L, H, N)``, gates ``(B, L, H)``."""


def layer(m: Titans, x: Tensor, inner: Inner) -> tuple[Tensor, Any]:
    """The layer around a memory, from the beginning."""
    u = F.conv1d(F.pad((x @ m.qkv_proj.weight.T).mT, (m.d_conv - 1, 0)), m.conv_weight[:, None], groups=3 * m.dim).mT
    q, k, v = (t.unflatten(-1, (m.heads, m.N)) for t in F.silu(u).chunk(3, -1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    theta, alpha, *eta = torch.sigmoid(x @ m.rates_proj.weight.T + m.rates_proj.bias).split(m.heads, -1)
    y, state = inner(q, k, v, m.max_rate * theta, alpha, eta[0] if eta else torch.zeros_like(theta))
    y = (m.out_weight * y / (y.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()).flatten(2)
    return (y * F.silu(x @ m.gate_proj.weight.T)) @ m.out_proj.weight.T, state


def definition(m: Titans, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    norm = Norm(m.norm_weight.view(m.heads, m.N), m.norm_bias.view(m.heads, m.N)) if m.norm else None
    first = tuple(m.network)

    def inner(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor) -> tuple[Tensor, Memory]:
        start = tuple(W.expand(x.shape[0], *W.shape) for W in first)
        state = Memory(start, start, tuple(torch.zeros_like(W) for W in start))
        place = (torch.arange(x.shape[1]) % m.mini_batch).expand(x.shape[:2])
        target = v if norm is None else v - k
        logs = (torch.log1p(-alpha), eta.log())
        z, after = descend_with_momentum_reference(q, k, target, theta, *logs, m.mini_batch, norm, first, state, place)
        return (z if norm is None else q + F.layer_norm(z, (m.N,), eps=EPS) * norm.weight + norm.bias), after

    y, memory = layer(m, x, inner)
    return y, dict(enumerate(memory.tensors()))  # type: ignore[arg-type]


def learnt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in state.items() if key not in ("conv", "passed")}


@pytest.mark.parametrize(
    ("dim", "batch", "length", "options"),
    [
        (8, 3, 63, {"heads": 2, "mini_batch": 16}),
        (8, 2, 63, {"heads": 2, "mini_batch": 16, "depth": 2}),
        (6, 1, 41, {"heads": 1, "mini_batch": 7, "depth": 3, "expand": 1.5, "d_conv": 2}),
        (8, 2, 33, {"heads": 2, "norm": False, "mini_batch": 8}),
        (8, 2, 33, {"heads": 2, "norm": False, "momentum": False, "depth": 2, "mini_batch": 8}),
        (1, 2, 9, {}),
        pytest.param(8, 2, 257, {"heads": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.oracle("definition: token by token, gradients by autograd", "titans")
def test_definition(same_as: Callable[..., None], dim: int, batch: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    same_as(m, x, (y, learnt(state)), definition(m, x), 1e-8)


@pytest.mark.parametrize(("batch", "length"), [(2, 64), (3, 63), (1, 257)])
@pytest.mark.oracle("fla: naive_recurrent_gated_delta_rule, the layer around it", "titans")
def test_a_matrix_without_momentum_is_a_gated_delta_rule(held: Any, batch: int, length: int) -> None:
    """``M <- a M - theta k (k M - v)``, the error being taken before the decay; after it, as there, this is a rate of ``theta / a`` and values of ``a v``."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    m = mixer(12, torch.float32, heads=2, mini_batch=1, max_rate=0.7, momentum=False, norm=False)

    def inner(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        a, W = 1 - alpha, m.network[0].expand(batch, -1, -1, -1)
        return naive.naive_recurrent_gated_delta_rule(
            q, k, a[..., None] * v, theta / a, a.log(), 1.0, W, output_final_state=True
        )

    x = torch.randn(batch, length, 12, requires_grad=True)
    (y, state), (want, M) = m(x), layer(m, x, inner)
    held(x, (y, state["network.0"]), (want, M))
    torch.testing.assert_close((y, state["network.0"]), (want, M), rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    leaves = [x, *(p for name, p in m.named_parameters() if name != "out_proj.weight")]
    for a, b in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("size", [1, 16, 63])
@pytest.mark.oracle("fla: titans' combine_params and combine_params_log", "titans")
def test_coefficients_of_fla(held: Any, size: int) -> None:
    """All that fla's reference of Titans can be held to: its gradient of a layer norm divides one of three terms only."""
    naive = pytest.importorskip("fla.ops.titans.naive")
    r = torch.Generator().manual_seed(size)
    theta, alpha, eta = (torch.rand(2, 3, size, 1, generator=r, dtype=torch.float64) for _ in range(3))
    alpha, eta = 0.02 + 0.9 * alpha, (0.02 + 0.95 * eta).requires_grad_()
    steps = momentum_steps(theta, torch.log1p(-alpha), eta.log(), None)
    beta, beta_T, f, f_T, g, G, m_T, n_T = naive.combine_params(theta, alpha, eta, size)
    pairs = [
        (steps.read, beta),
        (steps.read_other, f),
        (steps.write, G),
        (steps.keep, beta_T),
        (steps.keep_other, f_T),
        (steps.leave, g),
        (steps.other, m_T),
        (steps.other_leave, n_T),
    ]
    mine, theirs = (torch.cat([t.reshape(6, -1) for t in some], 1) for some in zip(*pairs, strict=True))
    held(eta, (mine, None), (theirs, None))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # theirs is partly in float32
    logs = naive.combine_params_log(theta, alpha, eta, size)
    for (a, _), b in zip(pairs, [logs[i] for i in (0, 2, 5, 1, 3, 4, 6, 7)], strict=True):
        torch.testing.assert_close(a.reshape(b.shape).to(b), b, rtol=1e-5, atol=1e-6)


def test_blocks_equal_whole(monkeypatch: pytest.MonkeyPatch, blocks_equal_whole: Any) -> None:
    small = ("mmlong.mixers.learning_memory.BLOCK_TOKENS", 20)
    blocks_equal_whole(mixer(8, heads=2, mini_batch=8, depth=2), lambda: monkeypatch.setattr(*small))


@pytest.mark.parametrize("prop", ["pieces", "padding", "resets", "gradients", "segments"])
def test_a_deep_memory_keeps_the_contract(prop: str) -> None:
    check_mixer("titans", options={"depth": 2, "heads": 2, "mini_batch": 7}, only=prop, dims=(16,))


def test_initial_values() -> None:
    torch.manual_seed(0)
    m = create_mixer("titans", 1024, heads=128, depth=2, expand=8)
    assert isinstance(m, Titans)
    assert m.max_rate == 1 / m.mini_batch
    for W in m.network:
        torch.testing.assert_close(float(W.detach().std()), W.shape[1] ** -0.5, rtol=0.05, atol=0)
    theta, alpha, eta = torch.sigmoid(m.rates_proj.bias.detach()).split(128)
    assert (theta == 0.5).all()
    assert (eta == 0.5).all()
    spread = (alpha * m.mini_batch).log10()
    assert float(spread.min()) > -3.01
    assert float(spread.max()) < -0.99
    torch.testing.assert_close(float(spread.mean()), -2.0, rtol=0.1, atol=0)
    torch.testing.assert_close(float(m.rates_proj.weight.detach().std()), 0.02, rtol=0.05, atol=0)
    assert (m.norm_weight == 1).all()
    assert not m.norm_bias.any()
    assert 0.45 < float(m.conv_weight.detach().abs().max()) <= 0.5


def test_defaults_at_any_width_and_state_bytes() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("titans", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)
    assert create_mixer("titans", 256).heads == 4


@pytest.mark.parametrize("option", [{"depth": 0}, {"mini_batch": 0}, {"d_conv": 0}, {"depth": 2, "expand": 0.01}])
def test_impossible_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("titans", 16, **option)


def test_impossible_heads() -> None:
    with pytest.raises(ValueError, match="into 3 heads"):
        create_mixer("titans", 16, heads=3)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("titans", 16, causal=False)

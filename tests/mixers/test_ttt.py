"""TTT layers against flash-linear-attention's inner loop and the layer written out around it, and against their definition by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.ttt import TTTMixer
from mmlong.ops.rotary import rotary_reference
from mmlong.ops.test_time import EPS, Memory, Norm, descend
from mmlong.ops.test_time_reference import descend_reference

NAMES = ("ttt_linear", "ttt_mlp")


def mixer(name: str, dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Away from the initial values, and with rates at which the network learns something."""
    torch.manual_seed(0)
    m = create_mixer(name, dim, **{"base_rate": 1.0, **options}).to(dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


Inner = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""``(q, k, v, e, p) -> (LN(f(q)), state)``; tokens ``(B, L, H, N)``, e ``(B, L, H)``, p ``(size,)``."""


def layer(m: TTTMixer, x: Tensor, inner: Inner) -> tuple[Tensor, Any]:
    """The layer around an inner loop, from the beginning."""
    B, L, D = x.shape
    H, N, size = m.heads, m.N, m.mini_batch
    place = torch.arange(L) % size

    def conv(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(F.pad(t.mT, (m.d_conv - 1, 0)), weight[:, None], bias, groups=D).mT

    def heads(t: Tensor) -> Tensor:
        return t.reshape(B, L, H, N)

    q = x @ m.q_proj.weight.T
    if m.share_qk:
        q, k = conv(q, m.conv_q_weight, m.conv_q_bias), conv(q, m.conv_k_weight, m.conv_k_bias)
    else:
        k = x @ m.k_proj.weight.T
    q, k = (rotary_reference(heads(t), place, m.rope_base) for t in (q, k))
    e = torch.sigmoid(x @ m.rate_proj.weight.T + m.rate_proj.bias) * m.base_rate / N
    p = (1 / torch.arange(1, size + 1).to(x) + m.place_rate).clamp_min(0)
    z, state = inner(q, k, heads(x @ m.v_proj.weight.T), e, p)
    y = F.layer_norm((q + z).flatten(2), (D,), m.post_weight, m.post_bias, EPS)
    if m.gate:
        y = y * F.gelu(x @ m.gate_proj.weight.T, approximate="tanh")
    return y @ m.out_proj.weight.T, state


def definition(m: TTTMixer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    norm = Norm(m.norm_weight.view(m.heads, m.N), m.norm_bias.view(m.heads, m.N))
    first = tuple(m.network)

    def inner(q: Tensor, k: Tensor, v: Tensor, e: Tensor, p: Tensor) -> tuple[Tensor, Memory]:
        start = tuple(W.expand(x.shape[0], *W.shape) for W in first)
        state = Memory(None, start, tuple(torch.zeros_like(W) for W in start))
        place = (torch.arange(x.shape[1]) % m.mini_batch).expand(x.shape[:2])
        z, after = descend_reference(q, k, v - k, e, p, norm, first, state, place)
        return F.layer_norm(z, (m.N,), eps=EPS) * norm.weight + norm.bias, after

    y, memory = layer(m, x, inner)
    return y, dict(enumerate(memory.tensors()))  # type: ignore[arg-type]


def learnt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in state.items() if key not in ("conv", "passed")}


@pytest.mark.parametrize(
    ("dim", "batch", "length", "options"),
    [
        (8, 3, 63, {"heads": 2}),
        (6, 1, 41, {"heads": 1, "mini_batch": 7, "d_conv": 2}),
        (8, 2, 33, {"heads": 2, "share_qk": False, "gate": False, "rope_base": 100.0}),
        (1, 2, 9, {}),
        pytest.param(8, 2, 257, {"heads": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.oracle("definition: token by token, gradients by autograd")
def test_definition(
    same_as: Callable[..., None], name: str, dim: int, batch: int, length: int, options: dict[str, Any]
) -> None:
    m = mixer(name, dim, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    same_as(m, x, (y, learnt(state)), definition(m, x), 1e-8)


def flas_loop(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, weight: Tensor, bias: Tensor, size: int, W: Tensor
) -> tuple[Tensor, Tensor]:
    """fla's reference: ``o + LN(o)``, and the network after the last token; ``W (B, H, N + 1, N)`` before the first."""
    naive = pytest.importorskip("fla.ops.ttt.naive")
    # It multiplies the queries it is given in place.
    o, W, b = naive.chunk_ttt_linear_ref(
        q.clone(), k, v, weight, bias, eta, 1.0, EPS, size, W[..., :-1, :], W[..., -1:, :], True
    )
    return o, torch.cat([W, b], -2)


@pytest.mark.parametrize(("batch", "length", "size"), [(2, 64, 16), (1, 60, 4), (3, 63, 16), (1, 257, 8)])
@pytest.mark.oracle("fla: chunk_ttt_linear_ref", "ttt_linear")
def test_inner_loop_of_fla(held: Any, batch: int, length: int, size: int) -> None:
    """Any norm. Its rate is a factor of the token that reads, as p here: it has no e. It computes in float32, and in a last mini-batch that is not full lets padding teach the bias."""
    H, N = 2, 6
    r = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, length, H, N, generator=r).requires_grad_() for _ in range(3))
    weight, bias = 1 + 0.3 * torch.randn(H, N, generator=r), 0.3 * torch.randn(H, N, generator=r)
    start = 0.3 * torch.randn(batch, H, N + 1, N, generator=r)
    p = torch.rand(size, generator=r) / N
    place = (torch.arange(length) % size).expand(batch, length)
    eta = p[place][..., None, None].expand(-1, -1, H, 1).contiguous()
    want, network = flas_loop(q, k, v, eta, weight, bias, size, start)
    e, state = torch.ones(batch, length, H), Memory(None, (start,), (torch.zeros_like(start),))
    z, after = descend(q, k, v - k, e, p, Norm(weight, bias), (start[0],), state, place)
    y = z + F.layer_norm(z, (N,), eps=EPS) * weight + bias
    full = length % size == 0
    held(q, (y, after.network[0] if full else None), (want, network if full else None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    if full:
        torch.testing.assert_close(after.network[0], network, rtol=1e-4, atol=1e-4)
    dy = torch.randn(want.shape, generator=r)
    for a, b in zip(*(torch.autograd.grad(t, [q, k, v], dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize(("batch", "length"), [(2, 64), (3, 45)])
@pytest.mark.oracle("fla: chunk_ttt_linear_ref, the layer around it", "ttt_linear")
def test_layer_around_flas_loop(held: Any, batch: int, length: int) -> None:
    """With one rate for all tokens of a head, and a norm whose weights are one: then ``LN(o + LN(o)) = LN(o)``."""
    m = mixer("ttt_linear", 12, torch.float32, heads=2)
    with torch.no_grad():
        m.rate_proj.weight.zero_()
        m.norm_weight.fill_(1)
        m.norm_bias.zero_()

    def inner(q: Tensor, k: Tensor, v: Tensor, e: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        eta = e[..., None] * p[torch.arange(length) % m.mini_batch][:, None, None]
        W = m.network[0].expand(batch, -1, -1, -1)
        o, after = flas_loop(q, k, v, eta, torch.ones(2, 6), torch.zeros(2, 6), m.mini_batch, W)
        return F.layer_norm(o, (6,), eps=EPS), after

    x = torch.randn(batch, length, 12, requires_grad=True)
    (y, state), (want, network) = m(x), layer(m, x, inner)
    full = length % m.mini_batch == 0
    held(x, (y, state["network.0"] if full else None), (want, network if full else None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    if full:
        torch.testing.assert_close(state["network.0"], network, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    leaves = [x, m.q_proj.weight, m.conv_k_weight, m.v_proj.weight, m.place_rate, m.network[0]]
    for a, b in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_equal_whole(monkeypatch: pytest.MonkeyPatch, blocks_equal_whole: Any, name: str) -> None:
    small = ("mmlong.mixers.learning_memory.BLOCK_TOKENS", 20)
    blocks_equal_whole(mixer(name, 8, heads=2, mini_batch=8), lambda: monkeypatch.setattr(*small))


@pytest.mark.parametrize("name", NAMES)
def test_initial_values(name: str) -> None:
    torch.manual_seed(0)
    m = create_mixer(name, 512)
    assert (m.heads, m.N, m.mini_batch) == (8, 64, 16)
    for W in m.network:
        torch.testing.assert_close(float(W[:, :-1].detach().std()), 0.02, rtol=0.05, atol=0)
        assert not W[:, -1].any()
    widths = [64, 64] if name == "ttt_linear" else [64, 256, 64]
    assert [tuple(W.shape) for W in m.network] == [(8, n + 1, p) for n, p in itertools.pairwise(widths)]
    assert m.base_rate == (1.0 if name == "ttt_linear" else 0.1)
    torch.testing.assert_close(float(m.rate_proj.weight.detach().std()), 0.02, rtol=0.1, atol=0)
    assert not m.rate_proj.bias.any()
    assert not m.place_rate.any()
    for weight, bias in ((m.norm_weight, m.norm_bias), (m.post_weight, m.post_bias)):
        assert (weight == 1).all()
        assert not bias.any()
    assert 0.45 < float(m.conv_q_weight.detach().abs().max()) <= 0.5


@pytest.mark.parametrize("name", NAMES)
def test_defaults_at_any_width_and_state_bytes(name: str) -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer(name, dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)
    assert create_mixer(name, 256).heads == 4


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="into 3 heads"):
        create_mixer("ttt_linear", 16, heads=3)
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("ttt_mlp", 16, mini_batch=0)
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("ttt_linear", 16, d_conv=0)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("ttt_linear", 16, causal=False)

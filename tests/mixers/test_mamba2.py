"""Mamba-2 against its recurrence and against transformers' mixer with the weights copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers import mamba2 as module
from mmlong.mixers.mamba2 import Mamba2
from mmlong.mixers.ssd import discretise
from mmlong.ops import blockwise
from mmlong.ops.gated_norm import gated_rms_norm, gated_rms_norm_reference


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2:
    torch.manual_seed(0)
    made = create_mixer("mamba2", dim, **options).to(dtype)
    assert isinstance(made, Mamba2)
    with torch.no_grad():
        made.D.uniform_(-1, 1)
        made.norm_weight.uniform_(0.5, 1.5)
        made.dt_bias.add_(1)  # faster decays than at the start of training, so that they matter
    return made


def recurrence(m: Mamba2, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the file's opening lines, token by token."""
    B, L, _ = x.shape
    z, u, raw = m.in_proj(x).split([m.inner, m.conv_dim, m.heads], dim=-1)
    padded = F.pad(u, (0, 0, m.d_conv - 1, 0))
    u = F.silu(sum(padded[:, i : i + L] * m.conv_weight[:, i] for i in range(m.d_conv)) + m.conv_bias)
    v, k, q = u.split([m.inner, *[m.ngroups * m.d_state] * 2], dim=-1)
    v = v.view(B, L, m.heads, m.headdim)
    k, q = (t.view(B, L, m.ngroups, -1).repeat_interleave(m.heads // m.ngroups, 2) for t in (k, q))
    dt = F.softplus(raw + m.dt_bias)
    S, outputs = x.new_zeros(B, m.heads, m.headdim, m.d_state), []
    for t in range(L):
        decay = torch.exp(dt[:, t] * -m.A_log.exp())
        S = decay[..., None, None] * S + dt[:, t, :, None, None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((S * q[:, t, :, None, :]).sum(-1) + m.D[:, None] * v[:, t])
    y = torch.stack(outputs, 1).flatten(2) * F.silu(z)
    y = y.unflatten(-1, (m.ngroups, -1))
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + m.norm_eps)
    return m.out_proj(m.norm_weight * y.flatten(2)), S


def small_blocks(monkeypatch: pytest.MonkeyPatch, elements: int = 1) -> None:
    """Blocks of about as many tokens, or of 256 if that is more."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "BLOCK_TOKENS", 256)


def same_gradients(m: torch.nn.Module, x: Tensor, got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    leaves = [x, *m.parameters()]
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=want.dtype)
    mine, theirs = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (got, want))
    for name, a, b in zip(["x", *[n for n, _ in m.named_parameters()]], mine, theirs, strict=True):
        scale = float(b.abs().max()) + 1e-30
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=10 * tolerance, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    ("dim", "length", "options"),
    [
        (16, 63, {}),
        (16, 257, {"headdim": 8}),
        (12, 63, {"headdim": 4, "ngroups": 3, "d_state": 5, "d_conv": 3, "chunk": 7}),
        (1, 9, {"expand": 1}),
    ],
)
@pytest.mark.oracle("definition: token by token", "mamba2")
def test_against_recurrence(held: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(3, length, dim, dtype=torch.float64, requires_grad=True)
    (y, state), (want, S) = m(x), recurrence(m, x)
    held(x, (y, state["ssm"]), (want, S))
    torch.testing.assert_close(state["ssm"], S, rtol=1e-9, atol=1e-9)
    same_gradients(m, x, y, want)


def transformers_mixer(m: Mamba2, dtype: torch.dtype) -> torch.nn.Module:
    code = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = code.Mamba2Config(
        hidden_size=m.dim,
        num_heads=m.heads,
        head_dim=m.headdim,
        state_size=m.d_state,
        n_groups=m.ngroups,
        conv_kernel=m.d_conv,
        expand=m.inner // m.dim,
        chunk_size=16,
        layer_norm_epsilon=m.norm_eps,
        use_conv_bias=True,
        use_bias=False,
        num_hidden_layers=1,
    )
    theirs = code.Mamba2Mixer(config, layer_idx=0).to(dtype)
    with torch.no_grad():
        theirs.in_proj.weight.copy_(m.in_proj.weight)
        theirs.conv1d.weight.copy_(m.conv_weight[:, None])
        theirs.conv1d.bias.copy_(m.conv_bias)
        theirs.dt_bias.copy_(m.dt_bias)
        theirs.A_log.copy_(m.A_log)
        theirs.D.copy_(m.D)
        theirs.norm.weight.copy_(m.norm_weight)
        theirs.out_proj.weight.copy_(m.out_proj.weight)
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"headdim": 8, "ngroups": 2}])
@pytest.mark.oracle("transformers: Mamba2Mixer", "mamba2")
def test_against_transformers(held: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Their recurrence runs in float32 whatever the input, which bounds the agreement."""
    m = mixer(16, dtype, **options)
    theirs = transformers_mixer(m, dtype)
    x = torch.randn(2, 65, 16, dtype=dtype, requires_grad=True)
    y, want = m(x)[0], theirs(x)
    held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, m.A_log, m.dt_bias, m.in_proj.weight, m.conv_weight], dy)
    other = torch.autograd.grad(
        want, [x, theirs.A_log, theirs.dt_bias, theirs.in_proj.weight, theirs.conv1d.weight], dy
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.oracle("transformers: Mamba2Mixer", "mamba2")
def test_state_against_transformers_cache(held: Any) -> None:
    code = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    m = mixer(16, torch.float32, headdim=8)
    theirs = transformers_mixer(m, torch.float32).eval()
    x = torch.randn(2, 37, 16)
    cache = code.DynamicCache(config=code.Mamba2Config(num_hidden_layers=1, hidden_size=16, head_dim=8, num_heads=4))
    with torch.no_grad():
        want = theirs(x[:, :30], cache_params=cache)
        y, state = m(x[:, :30])
        held(x, (y, state["ssm"]), (want, cache.layers[0].recurrent_states[0]))
        torch.testing.assert_close(state["ssm"], cache.layers[0].recurrent_states[0], rtol=1e-4, atol=1e-5)
        for t in range(30, 37):
            want = theirs(x[:, t : t + 1], cache_params=cache)
            y, state = m(x[:, t : t + 1], state)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stretch", [2048, 100])
@pytest.mark.parametrize("layout", [None, "lengths and resets"])
def test_blocks_equal_whole(monkeypatch: pytest.MonkeyPatch, layout: str | None, stretch: int) -> None:
    monkeypatch.setattr(blockwise, "STRETCH", stretch)  # a row at a time, or two rows and then one
    m = mixer(8, headdim=4, chunk=8)
    x = torch.randn(3, 700, 8, dtype=torch.float64, requires_grad=True)
    described = None
    if layout:
        resets = torch.zeros(3, 700, dtype=torch.bool)
        resets[0, [0, 255, 256, 300]] = True
        resets[2, [511, 699]] = True
        described = Layout(lengths=torch.tensor([700, 0, 400]), resets=resets)
    _, state = m(torch.randn(3, 5, 8, dtype=torch.float64))
    state = {name: t.detach().requires_grad_() for name, t in state.items()}
    results = []
    for block in (1 << 30, 1):
        small_blocks(monkeypatch, block)
        y, after = m(x, state, described)
        assert ("Blockwise" in y.grad_fn.name()) == (block == 1)
        y = y if described is None else torch.where(described.valid(700)[..., None], y, 0)
        total = y.sin().sum() + after["ssm"].square().sum() + after["conv"].sin().sum()
        results.append([y, *after.values(), *torch.autograd.grad(total, [x, *state.values(), *m.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_without_gradient_of_the_input_or_some_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    m = mixer(8)
    m.out_proj.weight.requires_grad_(False)
    x = torch.randn(2, 600, 8, dtype=torch.float64)
    gradients = []
    for block in (1 << 30, 1):
        small_blocks(monkeypatch, block)
        m.zero_grad()
        m(x)[0].square().sum().backward()
        assert m.out_proj.weight.grad is None
        gradients.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"ngroups": 2, "headdim": 4, "d_conv": 3}, {"expand": 1, "d_state": 3}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_drawn_token_is_what_a_piece_of_one_is(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The short way, which generation takes, against the definition and against the way with a gradient."""
    m = mixer(16, dtype, **options)
    x = torch.randn(3, 21, 16, dtype=dtype)
    short: Any = None
    long: Any = None
    want, S = recurrence(m, x)
    for t in range(21):
        with torch.no_grad():
            got, short = m(x[:, t : t + 1], short)
        y, long = m(x[:, t : t + 1], long)
        assert y.requires_grad
        assert not got.requires_grad
        assert got.dtype == dtype
        close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got, y.detach(), **close)
        for name in ("conv", "ssm"):
            assert short[name].dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(short[name], long[name].detach(), **close)
        if dtype != torch.bfloat16:
            torch.testing.assert_close(got[:, 0], want[:, t].detach())
    if dtype != torch.bfloat16:
        torch.testing.assert_close(short["ssm"], S.detach())


def test_a_drawn_token_under_autocast() -> None:
    m = mixer(16, torch.float32)
    x = torch.randn(2, 9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state: Any = None
        for t in range(9):
            got, state = m(x[:, t : t + 1], state)
        whole, after = m(x)
    assert state["ssm"].dtype == torch.float32
    torch.testing.assert_close(got[:, 0].float(), whole[:, -1].float(), rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(state["ssm"], after["ssm"], rtol=3e-2, atol=3e-2)


def test_under_activation_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    m = mixer(8)
    x = torch.randn(2, 300, 8, dtype=torch.float64, requires_grad=True)
    same_gradients(m, x, checkpoint(lambda t: m(t)[0], x, use_reentrant=False), m(x)[0])


def test_bfloat16_autocast_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    m = mixer(16, torch.float32)
    x = torch.randn(2, 600, 16, requires_grad=True)
    want, _ = m(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = m(x)
    assert state["ssm"].dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.05 * float(want.detach().abs().max()))
    (a,), (b,) = (torch.autograd.grad(t.float().square().sum(), x) for t in (y, want))
    assert float((a - b).norm() / b.norm()) < 0.05


def test_discretisation_far_from_zero() -> None:
    raw = torch.tensor([-200.0, -90.0, -20.0, -15.0, -14.9, 0.0, 30.0], dtype=torch.float32)[None, :, None]
    raw.requires_grad_()
    g, log = discretise(raw, torch.zeros(1), torch.zeros(1))
    exact = raw.detach().double()
    want = torch.where(exact < -30, exact, F.softplus(exact, threshold=100).log())
    torch.testing.assert_close(log.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g.double(), -F.softplus(exact), rtol=1e-6, atol=1e-9)
    (slope,) = torch.autograd.grad(log.sum(), raw)
    torch.testing.assert_close(slope[0, 0], torch.ones(1))
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(groups: int) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    got, want = (f(*inputs, weight, groups) for f in (gated_rms_norm, gated_rms_norm_reference))
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(t, [*inputs, weight], dy) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    silent = torch.zeros(1, 2, 6, requires_grad=True)
    out = gated_rms_norm(silent, torch.zeros(1, 2, 6), torch.ones(6))
    (slope,) = torch.autograd.grad(out.sum(), silent)
    assert torch.isfinite(slope).all()


def test_defaults_at_any_width_and_state_bytes() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("mamba2", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="must divide into heads of 7"):
        create_mixer("mamba2", 16, headdim=7)
    with pytest.raises(ValueError, match="into 3 groups"):
        create_mixer("mamba2", 16, headdim=8, ngroups=3)
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("mamba2", 16, chunk=0)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("mamba2", 16, causal=False)

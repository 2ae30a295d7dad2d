"""Mamba-3 against its recurrence, token by token as the authors' reference writes it; special cases; initial values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer

FORMS: list[dict[str, Any]] = [
    {},
    {"headdim": 8, "ngroups": 2, "rope_fraction": 1.0, "norm": True},
    {"headdim": 16, "rank": 4},
    {"headdim": 8, "ngroups": 2, "rank": 2, "norm": True, "d_state": 6},
]


def build(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("mamba3", 16, **options).to(dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
        m.dt_bias.fill_(-0.5)  # steps at which all parts count
    return m


def definition(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the last state, by the paper's equations."""
    H, P, N, R, A = m.heads, m.headdim, m.d_state, m.rank, m.angles
    z, v, B, C, dt, rate, mix, theta = m.in_proj(x).split([m.inner, m.inner, *[R * m.ngroups * N] * 2, H, H, H, A], -1)

    def rows(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        t = t.unflatten(-1, (R, m.ngroups, N))
        t = weight * t / (t.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()
        return t.repeat_interleave(H // m.ngroups, 3).transpose(2, 3) + bias  # (B, L, H, R, N)

    def turned(t: Tensor, angle: Tensor) -> Tensor:
        point = torch.complex(t[..., :A], t[..., A : 2 * A]) * torch.exp(1j * angle[:, :, None])
        return torch.cat([point.real, point.imag, t[..., 2 * A :]], -1)

    one = x.new_ones(H, R, P)
    into, gates, out = (m.rank_x, m.rank_z, m.rank_out) if R > 1 else (one, one, one)
    q, k = rows(C, m.C_norm, m.C_bias), rows(B, m.B_norm, m.B_bias)
    v, z = (t.unflatten(-1, (H, 1, P)) * w for t, w in ((v, into), (z, gates)))
    dt = torch.log1p(torch.exp(dt + m.dt_bias))
    alpha = torch.exp(-torch.log1p(torch.exp(rate)).clamp_min(m.A_floor) * dt)
    mix = 1 / (1 + torch.exp(-mix))
    S, angle = x.new_zeros(x.shape[0], H, P, N), x.new_zeros(x.shape[0], H, A)
    before = torch.zeros_like(S)
    ys = []
    for t in range(x.shape[1]):
        angle = angle + math.pi * torch.tanh(theta[:, t])[:, None] * dt[:, t, :, None]
        write = torch.einsum("bhrp,bhrn->bhpn", v[:, t], turned(k[:, t], angle))
        a, d, lam = (s[:, t, :, None, None] for s in (alpha, dt, mix))
        S = a * S + (1 - lam) * d * a * before + lam * d * write
        before = write
        y = torch.einsum("bhpn,bhrn->bhrp", S, turned(q[:, t], angle)) + m.D[:, None, None] * v[:, t]
        if m.norm_weight is not None:
            y = m.norm_weight.view(H, 1, P) * y / (y.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()
        ys.append((y * F.silu(z[:, t]) * out).sum(2).flatten(1))
    return m.out_proj(torch.stack(ys, 1)), S


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize(("batch", "length"), [(1, 63), (3, 17), (2, 1)])
@pytest.mark.oracle("definition: token by token", "mamba3")
def test_is_its_recurrence(held: Any, options: dict[str, Any], batch: int, length: int) -> None:
    m = build(**options)
    x = torch.randn(batch, length, 16, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    expected, S = definition(m, x)
    held(x, (y, state["S"]), (expected, S))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["S"], S, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad((expected * dy).sum(), [x, *m.parameters()], allow_unused=True)
    found = torch.autograd.grad((y * dy).sum(), [x, *m.parameters()], allow_unused=True)
    for g, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)


def test_float32_and_many_turns() -> None:
    m = build(torch.float32, headdim=8)
    with torch.no_grad():
        m.in_proj.weight[-m.angles :] *= 20  # close to half a turn for each unit of time
        m.dt_bias.fill_(2)
    x = torch.randn(1, 3000, 16)
    with torch.no_grad():
        y, _ = m(x)
        exact, _ = m.double()(x.double())
    assert float((y - exact).abs().max()) < 2e-5 * float(exact.abs().max())


def test_ranks_that_are_alike_are_one() -> None:
    """Two write a half each of the same, and are read alike; without D, of which each would see a half."""
    one, two = build(headdim=8), create_mixer("mamba3", 16, headdim=8, rank=2).double()
    with torch.no_grad():
        one.D.zero_()
    own = {**two.state_dict(), **one.state_dict()}
    z_and_x, B, C, small = one.in_proj.weight.split(
        [2 * one.inner, one.d_state, one.d_state, 3 * one.heads + one.angles]
    )
    own["in_proj.weight"] = torch.cat([z_and_x, B, B, C, C, small])
    own["B_bias"], own["C_bias"] = (p.expand(-1, 2, -1) for p in (one.B_bias, one.C_bias))
    two.load_state_dict(own)
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(two(x)[0], one(x)[0], rtol=1e-9, atol=1e-9)


def test_initial_values() -> None:
    torch.manual_seed(0)
    m: Any = create_mixer("mamba3", 2048, headdim=8, rank=4)
    dt = F.softplus(m.dt_bias.detach())
    assert float(dt.min()) >= 1e-3
    assert float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx((math.log(1e-3) + math.log(1e-1)) / 2, abs=0.2)
    for p in (m.B_bias, m.C_bias, m.B_norm, m.C_norm, m.D, m.rank_z):
        assert torch.equal(p, torch.ones_like(p))
    for p in (m.rank_x, m.rank_out):
        assert torch.equal(p, torch.full_like(p, 0.25))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"headdim": 7}, "must divide into heads of 7"),
        ({"ngroups": 3}, "into 3 groups"),
        ({"ngroups": 0}, "into 0 groups"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rope_fraction": 0.3}, "rope_fraction must be 0.5 or 1, got 0.3"),
        ({"d_state": 2}, "leaves no pair"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"A_floor": -1.0}, "A_floor >= 0"),
    ],
)
def test_errors(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        create_mixer("mamba3", 16, **options)

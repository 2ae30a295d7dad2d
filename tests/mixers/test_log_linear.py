"""Log-linear Mamba-2 against its definition over all pairs, and with flash-linear-attention's masks in place of the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, log_linear, state_bytes
from mmlong.mixers.log_linear import LogLinear
from mmlong.ops.log_linear_attention import log_linear_reference

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> LogLinear:
    torch.manual_seed(0)
    made = create_mixer("log_linear", dim, **options).to(dtype)
    assert isinstance(made, LogLinear)
    with torch.no_grad():
        for p in (made.D, made.level_scale):
            p.uniform_(-1, 1)
        made.norm_weight.uniform_(0.5, 1.5)
        made.level_proj.weight.mul_(3)  # weights of levels that differ
    return made


def over_pairs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """All pairs at once."""
    L, H, K = w.shape[1:]
    q, k = (t.repeat_interleave(H // t.shape[2], 2) for t in (q, k))
    digits = torch.tensor([[(t ^ s).bit_length() for s in range(L)] for t in range(L)]).clamp_max(K - 1)
    a = g.cumsum(1)
    decay = (a[:, :, None] - a[:, None]).masked_fill(torch.ones(L, L).triu(1)[..., None] > 0, -math.inf).exp()
    seen = sum((digits == number)[..., None] * w[:, :, None, :, number] for number in range(K))
    return torch.einsum("btsh,bshp->bthp", torch.einsum("bthn,bshn->btsh", q, k) * decay * seen, v)


def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """flash-linear-attention's hierarchical masks."""
    naive = pytest.importorskip("fla.ops.log_linear_attn.naive")
    return naive.naive_log_linear_attn(q, k, v, g, w)


def layer(m: LogLinear, x: Tensor, recurrence: Recurrence) -> tuple[Tensor, dict[str, Tensor]]:
    """The equations in the file's opening lines, one after another; and the state by the carry, token by token."""
    B, L, _ = x.shape
    z, u, raw = m.in_proj(x).split(m.parts, dim=-1)
    tail = F.pad(u, (0, 0, m.d_conv - 1, 0))
    u = F.silu(sum(tail[:, i : i + L] * m.conv_weight[:, i] for i in range(m.d_conv)) + m.conv_bias)
    v, k, q = u.split([m.inner, *[m.ngroups * m.d_state] * 2], dim=-1)
    v = v.view(B, L, m.heads, m.headdim)
    k, q = (t.view(B, L, m.ngroups, -1) for t in (k, q))
    dt = F.softplus(raw + m.dt_bias)
    w = F.softplus(m.level_scale * m.level_proj(x).view(B, L, m.heads, m.levels))
    given = q, k, v * dt[..., None], dt * -m.A_log.exp(), w
    y = recurrence(*given) + m.D[:, None] * v
    y = (y.flatten(2) * F.silu(z)).unflatten(-1, (m.ngroups, -1))
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + m.norm_eps)
    _, S, passed = log_linear_reference(*given)
    state = {"conv": tail[:, L:], "S": S, "passed": passed}
    return m.out_proj(m.norm_weight * y.flatten(2)), state


def floats(outcome: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Without the count, which has no gradient."""
    y, state = outcome
    return y, {name: state[name] for name in ("conv", "S")}


CASES = [
    (16, 63, {}),
    (16, 257, {"headdim": 8, "levels": 11}),
    (12, 63, {"headdim": 4, "ngroups": 3, "d_state": 5, "d_conv": 3, "levels": 7, "chunk": 7}),
    (16, 130, {"headdim": 16, "levels": 4, "chunk": 16}),
    (1, 9, {"expand": 1}),
]


@pytest.mark.parametrize(("dim", "length", "options"), CASES)
@pytest.mark.oracle("definition: over all pairs", "log_linear")
def test_against_all_pairs(same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    got, want = m(x), layer(m, x, over_pairs)
    assert got[1]["passed"].tolist() == want[1]["passed"].tolist() == [length] * 2
    same_as(m, x, floats(got), floats(want))


@pytest.mark.parametrize(
    ("dim", "length", "options"), [*CASES[:2], (12, 63, {"headdim": 4, "ngroups": 3, "levels": 7})]
)
@pytest.mark.oracle("fla: naive_log_linear_attn", "log_linear")
def test_against_flash_linear_attention(
    same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any]
) -> None:
    m = mixer(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    same_as(m, x, floats(m(x)), floats(layer(m, x, fla)))


def test_rows_of_a_layout_go_a_few_at_a_time(in_small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    m = mixer(16, levels=6, chunk=8)
    monkeypatch.setattr(log_linear, "BLOCK_TOKENS", 100)
    x = torch.randn(5, 120, 16, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(5, 120, dtype=torch.bool)
    resets[1, 50] = resets[4, 7] = True
    layout = Layout(lengths=torch.tensor([120, 90, 0, 3, 101]), resets=resets)
    _, past = m(x[:, :9])
    got = m(x, past, layout)
    monkeypatch.setattr(log_linear, "ROWS", 5)
    want = m(x, past, layout)
    assert got[1]["passed"].tolist() == want[1]["passed"].tolist() == [129, 40, 9, 12, 94]
    valid = layout.valid(120)
    assert valid is not None
    for a, b in ((got[0][valid], want[0][valid]), (got[1]["S"], want[1]["S"]), (got[1]["conv"], want[1]["conv"])):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        *(
            torch.autograd.grad(
                y[valid].sum() + s["S"].sum(), [x, *m.parameters()], allow_unused=True, retain_graph=True
            )
            for y, s in (got, want)
        ),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_blocks_under_autocast(in_small_blocks: None) -> None:
    m = mixer(16, torch.float32)
    x = torch.randn(2, 600, 16, requires_grad=True)
    want, _ = m(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = m(x)
    assert state["S"].dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.05 * float(want.detach().abs().max()))
    (a,), (b,) = (torch.autograd.grad(t.float().square().sum(), x) for t in (y, want))
    assert float((a - b).norm() / b.norm()) < 0.05


def test_at_the_start_levels_weigh_alike_about_log_2() -> None:
    torch.manual_seed(0)
    m: Any = create_mixer("log_linear", 256)
    assert (m.heads, m.headdim, m.d_state, m.levels) == (8, 64, 64, 22)
    x = torch.randn(1, 512, 256)
    w = F.softplus(m.level_proj(x).unflatten(-1, (8, 22)) * m.level_scale)
    assert float((w.detach().mean((0, 1, 2)) - 0.73).abs().max()) < 0.05  # log 2, and a little for the spread
    dt = F.softplus(m.dt_bias.detach())
    assert 1e-3 * 0.99 <= float(dt.min()) <= float(dt.max()) <= 0.1 * 1.01
    A = m.A_log.detach().exp()
    assert 1 <= float(A.min()) <= float(A.max()) <= 16


def test_what_the_state_holds() -> None:
    """A bucket for each digit of the count that is one, and nothing in the others."""
    m = mixer(16)
    x = torch.randn(1, 45, 16, dtype=torch.float64)
    _, state = m(x)
    sizes = state["S"].detach().abs().amax((0, 1, 3, 4))
    assert state["passed"].tolist() == [45]  # 101101b
    assert (sizes > 0).nonzero()[:, 0].tolist() == [0, 2, 3, 5]


def test_defaults_at_any_width_and_state_bytes() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("log_linear", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="must divide into heads of 7"):
        create_mixer("log_linear", 16, headdim=7)
    with pytest.raises(ValueError, match="into 3 groups"):
        create_mixer("log_linear", 16, headdim=8, ngroups=3)
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("log_linear", 16, chunk=0)
    with pytest.raises(ValueError, match="levels must be from 2"):
        create_mixer("log_linear", 16, levels=1)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("log_linear", 16, causal=False)

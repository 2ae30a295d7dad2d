"""HGRN against its definition, and against flash-linear-attention's real recurrence in coordinates that turn with the channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes

CASES = [(16, 257, {}), (8, 63, {"lower_bound": 0.4}), (1, 9, {})]


def build(dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("hgrn", dim, **options).to(dtype)
    with torch.no_grad():
        m.norm_weight.uniform_(0.5, 1.5)
        m.norm_bias.uniform_(-0.5, 0.5)
        for p in m.parameters():
            p.mul_(2)
    return m


def parts(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ``(B, L, D, 2)`` and forget gates ``(B, L, D)``."""
    a = m.lower_bound + (1 - m.lower_bound) * torch.sigmoid(m.forget_proj(x))
    return (1 - a)[..., None] * F.silu(m.in_proj(x)).unflatten(-1, (-1, 2)), a


def out(m: Any, x: Tensor, h: Tensor) -> Tensor:
    """``h (B, L, D, 2)``."""
    normed = F.layer_norm(h.flatten(2), (2 * m.dim,), m.norm_weight, m.norm_bias, m.norm_eps)
    return m.out_proj(normed * F.silu(m.gate_proj(x)))


def turned(t: Tensor, angle: Tensor) -> Tensor:
    """Pairs ``(..., 2)`` turned by an angle, in real numbers."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * t[..., 0] - sin * t[..., 1], sin * t[..., 0] + cos * t[..., 1]], -1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dim", "length", "options"), CASES)
@pytest.mark.oracle("definition: token by token", "hgrn")
def test_against_the_definition(
    same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    before = torch.randn(batch, dim, 2, dtype=torch.float64)
    written, a = parts(m, x)
    h, states = before, []
    for t in range(length):
        h = a[:, t, :, None] * turned(h, m.theta) + written[:, t]
        states.append(h)
    same_as(m, x, m(x, {"h": before}), (out(m, x, torch.stack(states, 1)), {"h": h}))


@pytest.mark.parametrize(("dim", "length", "options"), CASES[:2])
@pytest.mark.oracle("fla: naive_recurrent_hgrn", "hgrn")
def test_against_flash_linear_attention(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    """``exp(-i theta t) h_t`` is a real recurrence of its two parts, which theirs runs in float32."""
    naive = pytest.importorskip("fla.ops.hgrn.naive")
    m = build(dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    written, a = parts(m, x)
    angle = torch.arange(length)[:, None] * m.theta
    still = turned(written, -angle).flatten(2)
    h, last = naive.naive_recurrent_hgrn(still, a.log().repeat_interleave(2, -1), None, True)
    h, last = turned(h.unflatten(-1, (-1, 2)), angle), turned(last.unflatten(-1, (-1, 2)), angle[-1])
    same_as(m, x, m(x), (out(m, x, h), {"h": last}), 1e-4)


def test_initial_angles_and_gates() -> None:
    """Angles fall from 1 to nearly 0; gates are spread about 1/2, or half way from the lower bound to 1."""
    torch.manual_seed(0)
    m: Any = create_mixer("hgrn", 64, lower_bound=0.5)
    want = torch.tensor([1.0, 10000 ** (-2 / 64), 10000 ** (-126 / 64)])
    torch.testing.assert_close(m.theta.detach()[[0, 1, 63]], want)
    _, a = parts(m, torch.randn(1, 512, 64))
    assert float(a.detach().min()) > 0.5
    assert abs(float(a.detach().mean()) - 0.75) < 0.01


def test_gates_that_are_shut_or_open_are_finite() -> None:
    for bound in (0.0, 0.9):
        m = build(16, torch.float32, lower_bound=bound)
        x = (1e3 * torch.randn(1, 257, 16)).requires_grad_()
        y, state = m(x)
        gradients = torch.autograd.grad(y.sum(), [x, *m.parameters()])
        assert all(torch.isfinite(t).all() for t in (y, state["h"], *gradients))


def test_state_bytes() -> None:
    for dim in (1, 3, 16):
        m = create_mixer("hgrn", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000) == 8 * dim


def test_impossible_options() -> None:
    for bound in (1, -0.1):
        with pytest.raises(ValueError, match=f"hgrn: lower_bound must lie in \\[0, 1\\), got {bound}"):
            create_mixer("hgrn", 16, lower_bound=bound)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("hgrn", 16, causal=False)

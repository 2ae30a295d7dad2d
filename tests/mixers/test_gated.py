"""GLA and HGRN2 against their recurrences, and against flash-linear-attention's with the weights of the layer applied around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.ops.gated_linear_attention import gated_linear_attention_reference

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def definition(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return gated_linear_attention_reference(q, k, v, g, state=S)


def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's recurrence, which scales queries by N^(-1/2) and works in float32."""
    naive = pytest.importorskip("fla.ops.gla.naive")
    return naive.naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, g, S, True)


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(y, (y.shape[-1],), weight, eps)


def gla(m: Any, x: Tensor, S: Tensor, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
    """The layer's equations, one after another."""

    def heads(t: Tensor) -> Tensor:
        return t.view(*x.shape[:2], m.heads, -1)

    q, k, v = heads(m.q_proj(x)) * m.N**-0.5, heads(m.k_proj(x)), heads(m.v_proj(x))
    a = torch.sigmoid(m.decay_up(m.decay_down(x))) ** (1 / m.temperature)
    y, S = recurrence(q, k, v, heads(a.log()), S)
    y = rms_norm(y, m.norm_weight, m.norm_eps) * heads(F.silu(m.gate_proj(x)))
    return m.out_proj(y.flatten(2)), S


def hgrn2(m: Any, x: Tensor, S: Tensor, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
    a = m.lower_bound + (1 - m.lower_bound) * torch.sigmoid(m.forget_proj(x))
    q, k, v, g = (t.view(*x.shape[:2], m.heads, -1) for t in (F.silu(m.q_proj(x)), 1 - a, m.v_proj(x), a.log()))
    y, S = recurrence(q, k, v, g, S)
    return m.out_proj(rms_norm(y.flatten(2), m.norm_weight, m.norm_eps)), S


LAYERS = {"gla": gla, "hgrn2": hgrn2}
CASES = [
    ("gla", 16, 257, {}),
    ("gla", 24, 63, {"heads": 3, "expand_k": 1, "expand_v": 2, "gate_rank": 3, "temperature": 1.0, "chunk": 8}),
    ("gla", 1, 9, {}),
    ("hgrn2", 16, 257, {}),
    ("hgrn2", 24, 63, {"heads": 3, "lower_bound": 0.4, "chunk": 8}),
    ("hgrn2", 1, 9, {}),
]


def build(name: str, dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        m.norm_weight.uniform_(0.5, 1.5)
        for p in m.parameters():
            p.mul_(3)  # decays, gates and keys that matter
    return m


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "dim", "length", "options"), CASES)
@pytest.mark.oracle("definition: token by token")
def test_against_recurrence(
    same_as: Any, in_small_blocks: None, name: str, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(name, dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    S = torch.randn(batch, *m.state_shapes()["S"], dtype=torch.float64)
    y, S_after = LAYERS[name](m, x, S, definition)
    same_as(m, x, m(x, {"S": S}), (y, {"S": S_after}))


@pytest.mark.parametrize(("name", "dim", "length", "options"), CASES[:2] + CASES[3:5])
@pytest.mark.oracle("fla: naive_recurrent_gla")
def test_against_flash_linear_attention(
    same_as: Any, name: str, dim: int, length: int, options: dict[str, Any]
) -> None:
    m = build(name, dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    S = torch.zeros(2, *m.state_shapes()["S"])
    y, S_after = LAYERS[name](m, x, S, oracle)
    same_as(m, x, m(x), (y, {"S": S_after}), 1e-4)


def test_initial_decays() -> None:
    """At the start decays are spread about (1/2)^(1/16) = 0.958, by token and channel."""
    torch.manual_seed(0)
    m: Any = create_mixer("gla", 256)
    a = torch.sigmoid(m.decay_up(m.decay_down(torch.randn(1, 512, 256)))) ** (1 / 16)
    assert abs(float(a.detach().mean()) - 0.958) < 0.01
    bound = 2**-2.5 * math.sqrt(6 / (256 + 128))
    assert 0.9 * bound < float(m.q_proj.weight.detach().abs().max()) <= bound


def test_gates_that_are_shut_or_open_are_finite() -> None:
    for name, options in (("gla", {}), ("hgrn2", {}), ("hgrn2", {"lower_bound": 0.5})):
        m = build(name, 16, torch.float32, **options)
        x = (1e3 * torch.randn(1, 257, 16)).requires_grad_()
        y, state = m(x)
        gradients = torch.autograd.grad(y.sum(), [x, *m.parameters()])
        assert all(torch.isfinite(t).all() for t in (y, state["S"], *gradients)), name


def test_defaults_at_any_width_and_state_bytes() -> None:
    for name in LAYERS:
        for dim in (1, 3, 16, 24, 96, 256):
            m = create_mixer(name, dim)
            _, state = m(torch.randn(1, 3, dim))
            assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        create_mixer("gla", 16, heads=3)
    with pytest.raises(ValueError, match="leaves no channel"):
        create_mixer("gla", 16, expand_v=0)
    with pytest.raises(ValueError, match="gate_rank"):
        create_mixer("gla", 16, gate_rank=0)
    with pytest.raises(ValueError, match="lower_bound"):
        create_mixer("hgrn2", 16, lower_bound=1)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("hgrn2", 16, causal=False)

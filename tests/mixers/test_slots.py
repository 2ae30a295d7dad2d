"""Gated slot attention and ABC against their definitions, and against flash-linear-attention's recurrences with the layer's weights applied around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.slots import NOTHING, log_sums

Memory = tuple[Tensor, Tensor]


def heads(m: Any, t: Tensor) -> Tensor:
    return t.unflatten(-1, (m.heads, -1))


def through_slots(q: Tensor, k: Tensor, v: Tensor, a: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Memory]:
    """The definition in the file's opening lines, token by token: each slot fades, is written to, and is read by softmax."""
    outputs = []
    for t in range(q.shape[1]):
        fade = a[:, t, :, :, None]
        K = fade * K + (1 - fade) * k[:, t, :, None]
        V = fade * V + (1 - fade) * v[:, t, :, None]
        weights = (K @ q[:, t, :, :, None]).squeeze(-1).softmax(-1)
        outputs.append((V * weights[..., None]).sum(-2))
    return torch.stack(outputs, 1), (K, V)


def gsa_parts(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (heads(m, F.silu(p(x))) for p in (m.q_proj, m.k_proj, m.v_proj))
    return q, k, v, heads(m, torch.sigmoid(m.slot_proj(x)) ** (1 / m.damping))


def gsa_out(m: Any, y: Tensor) -> Tensor:
    return m.out_proj(F.rms_norm(F.silu(y).flatten(2), (m.dim,), m.norm_weight, m.norm_eps))


def gsa(m: Any, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    y, (K, V) = through_slots(*gsa_parts(m, x), state["K"], state["V"])
    return gsa_out(m, y), {"K": K, "V": V}


def abc(m: Any, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    q, k, v = (heads(m, p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    z, sums = state["log_sum"], []
    for control in m.slot_proj(x).unbind(1):
        sums.append(torch.logaddexp(z, control))
        z = sums[-1]
    zs = torch.stack(sums, 1)
    a = (torch.cat([state["log_sum"][:, None], zs[:, :-1]], 1) - zs).exp()
    y, (K, V) = through_slots(q * m.N**-0.5, k, v, heads(m, a), state["K"], state["V"])
    return m.out_proj(y.flatten(2)), {"K": K, "V": V, "log_sum": z}


LAYERS = {"gsa": gsa, "abc": abc}
CASES = [
    ("gsa", 16, 257, {}),
    ("gsa", 24, 63, {"heads": 3, "slots": 5, "damping": 1.0, "chunk": 8}),
    ("gsa", 1, 9, {"slots": 3}),
    ("abc", 16, 257, {}),
    ("abc", 24, 63, {"heads": 3, "slots": 5, "chunk": 8}),
    ("abc", 1, 9, {"slots": 3}),
]


def build(name: str, dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        if name == "gsa":
            m.norm_weight.uniform_(0.5, 1.5)
        for p in m.parameters():
            p.mul_(3)  # gates and scores that matter
    return m


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "dim", "length", "options"), CASES)
@pytest.mark.oracle("definition: token by token")
def test_against_the_definition(
    same_as: Any, in_small_blocks: None, name: str, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(name, dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    state = {key: torch.randn(batch, *shape, dtype=torch.float64) for key, shape in m.state_shapes().items()}
    same_as(m, x, m(x, state), LAYERS[name](m, x, state))


@pytest.mark.parametrize(("dim", "length", "options"), [case[1:] for case in CASES[:2]])
@pytest.mark.oracle("fla: naive_recurrent_gsa", "gsa")
def test_gsa_against_flash_linear_attention(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    naive = pytest.importorskip("fla.ops.gsa.naive")
    m = build("gsa", dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    q, k, v, a = gsa_parts(m, x)
    y, (K, V) = naive.naive_recurrent_gsa(q, k, v, 1 - a, a.log(), scale=1.0, output_final_state=True)
    same_as(m, x, m(x), (gsa_out(m, y), {"K": K.mT, "V": V}), 1e-4)


@pytest.mark.parametrize(("dim", "length", "options"), [case[1:] for case in CASES[3:5]])
@pytest.mark.oracle("fla: naive_recurrent_gsa, ungated", "abc")
def test_abc_against_flash_linear_attention(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    """Their recurrence, with the state, and their plain sums over all tokens."""
    gsa_naive, abc_naive = (pytest.importorskip(f"fla.ops.{name}.naive") for name in ("gsa", "abc"))
    m = build("abc", dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    q, k, v, control = (heads(m, p(x)) for p in (m.q_proj, m.k_proj, m.v_proj, m.slot_proj))
    y, (K, V) = gsa_naive.naive_recurrent_gsa(q, k, v, control, output_final_state=True)
    z = control.flatten(2).logsumexp(1)
    got = m(x)
    same_as(m, x, got, (m.out_proj(y.flatten(2)), {"K": K.mT, "V": V, "log_sum": z}), 1e-4)
    y, _ = abc_naive.naive_cumsum_abc(*(t.transpose(1, 2) for t in (q, k, v, control)))
    torch.testing.assert_close(got[0], m.out_proj(y.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-4)


def test_abc_slots_are_averages() -> None:
    """With equal controls a slot is the mean of all keys so far, at the end of a long past too; with one large control it is that key."""
    m = build("abc", 4, torch.float32, heads=1, slots=2)
    with torch.no_grad():
        m.slot_proj.weight.zero_()
    x = torch.randn(1, 5000, 4)
    _, state = m(x)
    torch.testing.assert_close(state["K"][0, 0, 1], m.k_proj(x)[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["log_sum"], torch.full((1, 2), math.log(5000)))
    with torch.no_grad():
        m.slot_proj.weight[:, 0] = 1.0
    x[0, 70, 0] = 200.0
    _, state = m(x)
    torch.testing.assert_close(state["K"][0, 0, 1], m.k_proj(x)[0, 70])


def test_log_sums_under_a_layout() -> None:
    torch.manual_seed(0)
    control = 100 * torch.randn(3, 150, 4, dtype=torch.float64)
    before = torch.randn(3, 4, dtype=torch.float64)
    before[1] = NOTHING
    resets = torch.zeros(3, 150, dtype=torch.bool)
    resets[0, [70, 71]] = True
    resets[2, 149] = True  # in the padding
    z = log_sums(control, before, Layout(torch.tensor([150, 0, 90]), resets))
    torch.testing.assert_close(z[0, 69], torch.cat([before[:1], control[0, :70]]).logsumexp(0))
    torch.testing.assert_close(z[0, 70], control[0, 70])
    torch.testing.assert_close(z[0, -1], control[0, 71:].logsumexp(0))
    assert torch.equal(z[1, -1], before[1])
    torch.testing.assert_close(z[2, -1], torch.cat([before[2:], control[2, :90]]).logsumexp(0))


def test_initial_decays() -> None:
    """At the start slots fade by about (1/2)^(1/8) = 0.917 a token."""
    torch.manual_seed(0)
    m: Any = create_mixer("gsa", 256)
    a = gsa_parts(m, torch.randn(1, 512, 256))[-1].detach()
    assert m.slots == 64
    assert abs(float(a.mean()) - 0.917) < 0.01


def test_gates_that_are_shut_or_open_are_finite() -> None:
    for name in LAYERS:
        m = build(name, 16, torch.float32)
        x = (1e3 * torch.randn(1, 257, 16)).requires_grad_()
        y, state = m(x)
        gradients = torch.autograd.grad(y.sum(), [x, *m.parameters()])
        assert all(torch.isfinite(t).all() for t in (y, *state.values(), *gradients)), name


def test_defaults_at_any_width_and_state_bytes() -> None:
    for name in LAYERS:
        for dim in (1, 3, 16, 24, 96):
            m = create_mixer(name, dim)
            _, state = m(torch.randn(1, 3, dim))
            assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    for name in LAYERS:
        with pytest.raises(ValueError, match=f"{name}: .* do not divide into 3 heads"):
            create_mixer(name, 16, heads=3)
        with pytest.raises(ValueError, match=f"{name}: slots must be at least 1, got 0"):
            create_mixer(name, 16, slots=0)
        with pytest.raises(ValueError, match="causal only"):
            create_mixer(name, 16, causal=False)
    with pytest.raises(ValueError, match="gsa: damping must be above 0, got 0"):
        create_mixer("gsa", 16, damping=0)

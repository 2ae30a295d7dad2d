"""RWKV-6 against its equations over the recurrence, here and in flash-linear-attention; token shift; initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.rwkv6 import MIXED
from mmlong.ops.gated_linear_attention import gated_linear_attention_reference
from mmlong.ops.token_shift import token_shift

Recurrence = Callable[..., tuple[Tensor, Tensor]]


def build(dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("rwkv6", dim, **options).to(dtype)
    with torch.no_grad():
        for name, p in m.named_parameters():
            p.add_(0.3 * torch.randn_like(p))
            if name == "decay_base":
                p.add_(3)  # decays that matter
    return m


def definition(r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return gated_linear_attention_reference(r, k, v, g, u, S)


def oracle(r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive")
    heads = [t.transpose(1, 2) for t in (r, k, v, g)]
    y, S = naive.naive_recurrent_rwkv6(*heads, u, scale=1.0, initial_state=S, output_final_state=True)
    return y.transpose(1, 2), S


def layer(m: Any, x: Tensor, last: Tensor, S: Tensor, recurrence: Recurrence) -> tuple[Tensor, dict[str, Tensor]]:
    """The equations of the file's opening lines, one after another."""
    d = torch.cat([last[:, None], x[:, :-1]], 1) - x
    rank = m.mix_up.shape[1]
    base = x + d * m.mix_base
    at = {}
    for i, name in enumerate(MIXED):
        A = m.mix_down.weight[i * rank : (i + 1) * rank]
        at[name] = x + d * (m.mix_each[i] + torch.tanh(base @ A.T) @ m.mix_up[i])
    g = -torch.exp(m.decay_base + m.decay_up(torch.tanh(m.decay_down(at["w"]))))  # log w
    r, k, v, g = (t.unflatten(-1, (m.heads, -1)) for t in (m.r_proj(at["r"]), m.k_proj(at["k"]), m.v_proj(at["v"]), g))
    y, S = recurrence(r, k, v, g, m.bonus, S)
    y = F.group_norm(y.flatten(0, 1).flatten(1), m.heads, m.norm_weight, m.norm_bias, m.norm_eps).view_as(x)
    return m.out_proj(y * F.silu(m.gate_proj(at["g"]))), {"last": x[:, -1], "S": S}


CASES = [(16, 257, {}), (24, 63, {"heads": 3, "mix_rank": 2, "decay_rank": 3, "chunk": 8, "depth": 0.5})]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dim", "length", "options"), CASES)
@pytest.mark.oracle("definition: token by token", "rwkv6")
def test_against_recurrence(
    same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    last = torch.randn(batch, dim, dtype=torch.float64)
    S = torch.randn(batch, *m.state_shapes()["S"], dtype=torch.float64)
    same_as(m, x, m(x, {"last": last, "S": S}), layer(m, x, last, S, definition))


@pytest.mark.oracle("fla: naive_recurrent_rwkv6", "rwkv6")
def test_against_flash_linear_attention(same_as: Any) -> None:
    dim, length, options = CASES[1]
    m = build(dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    S = torch.zeros(2, *m.state_shapes()["S"])
    same_as(m, x, m(x), layer(m, x, torch.zeros(2, dim), S, oracle), 1e-3)


def test_token_shift() -> None:
    x, last = torch.arange(1.0, 13).view(2, 6, 1), torch.tensor([[-1.0], [-2.0]])
    previous, after = token_shift(x, last)
    assert previous[..., 0].tolist() == [[-1, 1, 2, 3, 4, 5], [-2, 7, 8, 9, 10, 11]]
    assert after.tolist() == [[6], [12]]
    resets = torch.zeros(2, 6, dtype=torch.bool)
    resets[0, 2] = resets[1, 0] = True
    previous, after = token_shift(x, last, Layout(lengths=torch.tensor([0, 4]), resets=resets))
    assert previous[..., 0].tolist() == [[-1, 1, 0, 3, 4, 5], [0, 7, 8, 9, 10, 11]]
    assert after.tolist() == [[-1], [10]]
    assert token_shift(x.bfloat16(), last)[1].dtype == torch.float32


def test_initial_values() -> None:
    """As the authors': at first nothing depends on the token but by the shift; decays from 0.9975 in the first channel to 0.69 in the last."""
    first, last = (create_mixer("rwkv6", 64, depth=depth) for depth in (0, 1))
    decay = torch.exp(-torch.exp(first.decay_base.detach()))  # type: ignore[union-attr]
    torch.testing.assert_close(decay[[0, -1]], torch.tensor([0.99752, 0.69220]), rtol=1e-4, atol=0)
    assert (decay.diff() <= 0).all()
    torch.testing.assert_close(first.mix_each[0], 1 - torch.arange(64) / 64)  # type: ignore[union-attr]
    assert float(first.mix_down.weight.detach().abs().max()) == 0  # type: ignore[union-attr]
    assert 0 < float(first.mix_up.detach().abs().max()) <= 0.01  # type: ignore[union-attr]
    torch.testing.assert_close(first.bonus[0, :3], torch.tensor([0.0, 0.1, -0.1]))  # type: ignore[union-attr]
    torch.testing.assert_close(last.bonus[0, 0], torch.tensor(1.0))  # type: ignore[union-attr]


def test_fast_decays_are_finite() -> None:
    m = build(16, torch.float32)
    with torch.no_grad():
        m.decay_base.copy_(torch.linspace(-50, 200, 16))
    x = (1e3 * torch.randn(1, 257, 16)).requires_grad_()
    y, state = m(x)
    gradients = torch.autograd.grad(y.sum(), [x, *m.parameters()])
    assert all(torch.isfinite(t).all() for t in (y, state["S"], *gradients))


def test_defaults_at_any_width_and_state_bytes() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("rwkv6", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        create_mixer("rwkv6", 16, heads=3)
    with pytest.raises(ValueError, match="depth"):
        create_mixer("rwkv6", 16, depth=2)

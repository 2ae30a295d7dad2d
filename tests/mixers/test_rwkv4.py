"""RWKV-4's time mixing against transformers' with the weights copied, AFT-simple against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import RWKV4, AFTSimple, create_mixer, state_bytes
from mmlong.mixers import blocks as blocks_module


def perturbed(name: str, dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    made = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.oracle("transformers: RwkvSelfAttention", "rwkv4")
def test_against_transformers_with_its_state(held: Any) -> None:
    """Outputs, the four tensors of the state, and gradients; their recurrence runs in float32."""
    code = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    m = perturbed("rwkv4", 8, torch.float32)
    config = code.RwkvConfig(hidden_size=8, attention_hidden_size=8, num_hidden_layers=1)
    theirs = code.RwkvSelfAttention(config)
    with torch.no_grad():
        for mine, other in (("r", "receptance"), ("k", "key"), ("v", "value"), ("out", "output")):
            getattr(theirs, other).weight.copy_(getattr(m, f"{mine}_proj").weight)
        for share, other in zip(m.shift, ("receptance", "key", "value"), strict=True):
            getattr(theirs, f"time_mix_{other}").copy_(share[None, None])
        theirs.time_decay.copy_(m.decay)
        theirs.time_first.copy_(m.bonus)
    x = torch.randn(2, 65, 8, requires_grad=True)
    y, _ = m(x)
    want, _ = theirs(x)
    held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, m.decay, m.bonus, m.k_proj.weight, m.r_proj.weight], dy)
    names = (theirs.time_decay, theirs.time_first, theirs.key.weight, theirs.receptance.weight)
    other = torch.autograd.grad(want, [x, *names], dy)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    with torch.no_grad():
        state = [torch.zeros(2, 8, 1) for _ in range(5)]
        state[4] -= 1e30
        want, state = theirs(x[:, :40], state, use_cache=True)
        _, carried = m(x[:, :40])
        mine = [carried[key] for key in ("last", "num", "den", "max")]
        held(x, (y[:, :40], mine), (want, [t[..., 0] for t in state[1:]]))
        for key, t in zip(("last", "num", "den", "max"), state[1:], strict=True):
            torch.testing.assert_close(carried[key], t[..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m(x[:, 40:], carried)[0], y[:, 40:], rtol=1e-4, atol=1e-5)


@pytest.mark.oracle("transformers: RwkvFeedForward", "rwkv4_channel")
def test_channel_mixing_against_transformers(same_as: Any) -> None:
    code = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    m = perturbed("rwkv4_channel", 8, torch.float64, ratio=3)
    config = code.RwkvConfig(hidden_size=8, intermediate_size=24, num_hidden_layers=2)
    theirs = code.RwkvFeedForward(config).double()
    names = {"receptance.weight": m.r_proj.weight, "key.weight": m.k_proj.weight, "value.weight": m.v_proj.weight}
    shares = {f"time_mix_{name}": m.shift[i][None, None] for i, name in enumerate(("receptance", "key"))}
    x = torch.randn(2, 65, 8, dtype=torch.float64, requires_grad=True)
    want, _ = functional_call(theirs, {**names, **shares}, (x,))
    y, state = m(x)
    same_as(m, x, (y, state), (want, {"last": x[:, -1]}))
    _, state = m(x[:, :40])
    torch.testing.assert_close(m(x[:, 40:], state)[0], want[:, 40:])


@pytest.mark.oracle("definition: running sums", "aft_simple")
def test_aft_simple_is_its_formula(held: Any) -> None:
    m = perturbed("aft_simple", 6, torch.float64)
    x = torch.randn(2, 63, 6, dtype=torch.float64, requires_grad=True)
    r, k, v = m.r_proj(x), m.k_proj(x), m.v_proj(x)
    want = m.out_proj(torch.sigmoid(r) * (k.exp() * v).cumsum(1) / k.exp().cumsum(1))
    y, state = m(x)
    unit = state["max"].exp()
    sums = [(k.exp() * v).sum(1), k.exp().sum(1)]
    held(x, (y, [state["num"] * unit, state["den"] * unit]), (want, sums))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(y), [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["rwkv4", "aft_simple"])
def test_blocks_equal_whole(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    m = perturbed(name, 4, torch.float64)
    x = torch.randn(2, 300, 4, dtype=torch.float64, requires_grad=True)
    results: list[list[Tensor]] = []
    for tokens in (1 << 30, 64):
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(blocks_module, "BLOCK_TOKENS", tokens)
        y, after = m(x)
        total = y.sin().sum() + sum(t.sin().sum() for t in after.values())
        results.append([y, *after.values(), *torch.autograd.grad(total, [x, *m.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_initial_values() -> None:
    m = RWKV4(128, place=0.0).requires_grad_(False)
    assert float(m.decay[0]) == -5
    assert abs(float(m.decay[-1]) - 3) < 1e-5
    assert bool((m.decay.diff() > 0).all())
    levels = math.log(0.3) + torch.tensor([0.0, 0.5, -0.5])
    torch.testing.assert_close(m.bonus.detach()[:6], levels.repeat(2))
    torch.testing.assert_close(m.shift.detach()[1], torch.arange(128) / 128)
    last = RWKV4(128, place=1.0)
    torch.testing.assert_close(last.shift.detach(), torch.tensor([1.0, 1.0, 1.3])[:, None].expand(-1, 128))


def test_state_bytes_and_impossible_options() -> None:
    for m in (RWKV4(1), RWKV4(5), AFTSimple(5)):
        assert state_bytes(m(torch.randn(1, 3, m.dim))[1]) == m.state_bytes(3)
    for name in ("rwkv4", "rwkv4_channel"):
        with pytest.raises(ValueError, match="place"):
            create_mixer(name, 4, place=2)
    with pytest.raises(ValueError, match="no hidden channel"):
        create_mixer("rwkv4_channel", 4, ratio=0)

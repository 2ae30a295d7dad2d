"""RetNet against flash-linear-attention's retention with the layer's weights around it, lightning attention against transformers' MiniMax."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.ops.linear_attention import scalar_decay_reference
from mmlong.ops.rotary import rotary_reference

NAMES = ("retnet", "lightning")


def build(name: str, dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        m.norm_weight.uniform_(0.5, 1.5)
        for p in m.parameters():
            p.mul_(3)
    return m


def rotated(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RetNet's queries, keys and values, positions counted from 0."""
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    here = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return rotary_reference(q, here), rotary_reference(k * m.N**-0.5, here), v


def retnet_out(m: Any, x: Tensor, y: Tensor) -> Tensor:
    y = F.rms_norm(y, (m.P,), m.norm_weight, m.norm_eps).flatten(2)
    return m.out_proj(y * F.silu(m.gate_proj(x)))


def retnet(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = rotated(m, x)
    gamma = 1 - 2.0 ** (-5 - torch.arange(m.heads, dtype=torch.float64))
    y, S = scalar_decay_reference(q, k, v, gamma.log().float().to(x.dtype).expand(*x.shape[:2], -1))
    # The next token is position 0.
    back = torch.full((x.shape[0], m.P), -x.shape[1])
    return retnet_out(m, x, y), rotary_reference(S.transpose(1, 2), back).transpose(1, 2)


def lightning(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (F.silu(p(x)).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    y, S = scalar_decay_reference(q, k, v, m.log_decay.expand(*x.shape[:2], -1))
    y = F.rms_norm(y.flatten(2), (m.dim,), m.norm_weight, m.norm_eps)
    return m.out_proj(y * torch.sigmoid(m.gate_proj(x))), S


LAYERS = {"retnet": retnet, "lightning": lightning}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "dim", "length", "options"),
    [
        ("retnet", 16, 257, {}),
        ("retnet", 24, 63, {"heads": 3, "expand_v": 1, "chunk": 8}),
        ("retnet", 3, 9, {}),
        ("lightning", 16, 257, {}),
        ("lightning", 24, 63, {"heads": 3, "depth": 0.5, "chunk": 8}),
        ("lightning", 1, 9, {}),
    ],
)
@pytest.mark.oracle("definition: token by token")
def test_against_recurrence(
    same_as: Any, in_small_blocks: None, name: str, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(name, dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    y, S = LAYERS[name](m, x)
    same_as(m, x, m(x), (y, {"S": S}))


@pytest.mark.oracle("fla: naive_retention", "retnet")
def test_retnet_against_flash_linear_attention(same_as: Any) -> None:
    naive = pytest.importorskip("fla.ops.retention.naive")
    m = build("retnet", 24, torch.float32, heads=3)
    x = torch.randn(2, 257, 24, requires_grad=True)
    q, k, v = rotated(m, x)
    y = naive.naive_retention(*(t.transpose(1, 2) for t in (q * m.N**0.5, k, v))).transpose(1, 2)
    same_as(m, x, (m(x)[0], None), (retnet_out(m, x, y), None), 1e-4)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.oracle("transformers: MiniMaxLightningAttention", "lightning")
def test_lightning_against_transformers(held: Any, layer: int) -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    layers, dim, heads = 4, 32, 4
    config = minimax.MiniMaxConfig(
        hidden_size=dim, num_attention_heads=heads, num_hidden_layers=layers, head_dim=dim // heads, block_size=16
    )
    theirs = minimax.MiniMaxLightningAttention(config, layer)
    m = build("lightning", dim, torch.float32, heads=heads, depth=layer / (layers - 1 + 1e-5), norm_eps=1e-6)
    with torch.no_grad():
        parts = [p.weight.view(heads, -1, dim) for p in (m.q_proj, m.k_proj, m.v_proj)]
        theirs.qkv_proj.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        theirs.output_gate.weight.copy_(m.gate_proj.weight)
        theirs.out_proj.weight.copy_(m.out_proj.weight)
        theirs.norm.weight.copy_(m.norm_weight)
    x = torch.randn(2, 63, dim, requires_grad=True)
    want, S = theirs(x, None, None)
    y, state = m(x)
    held(x, (y, state["S"].mT), (want, S))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["S"].mT, S, rtol=1e-4, atol=1e-4)
    dy = torch.randn(y.shape)
    mine, other = (torch.autograd.grad(t, x, dy)[0] for t in (y, want))
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_decays() -> None:
    m: Any = create_mixer("retnet", 256)
    assert m.heads == 4
    torch.testing.assert_close(1 - m.log_decay.exp(), torch.tensor([2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8]))
    first, last = (create_mixer("lightning", 256, depth=depth) for depth in (0, 1))
    torch.testing.assert_close(first.log_decay, -torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]), rtol=1e-4, atol=0)
    torch.testing.assert_close(last.log_decay, 1e-5 * first.log_decay, rtol=1e-3, atol=0)


def test_retnet_has_no_positions_to_run_out_of() -> None:
    """What comes after a long past, met in float32 pieces of uneven length, is as exact as what comes at the beginning."""
    m = build("retnet", 16, torch.float32, heads=2)
    exact = copy.deepcopy(m).double()
    x = torch.randn(1, 700, 16)
    layout = Layout(resets=torch.zeros(1, 700, dtype=torch.bool).index_fill(1, torch.tensor([333]), True))
    with torch.no_grad():
        want, _ = exact(x.double(), None, layout)
        state, outputs, at = None, [], 0
        for n in (1, 300, 1, 98, 250, 50):
            y, state = m(x[:, at : at + n], state, layout.slice(at, at + n))
            outputs.append(y)
            at += n
    torch.testing.assert_close(torch.cat(outputs, 1).double(), want, rtol=1e-4, atol=1e-4)


def test_defaults_at_any_width_and_state_bytes() -> None:
    for name in NAMES:
        for dim in (1, 3, 16, 24, 96, 256):
            m = create_mixer(name, dim)
            _, state = m(torch.randn(1, 3, dim))
            assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        create_mixer("retnet", 16, heads=3)
    with pytest.raises(ValueError, match="depth must lie"):
        create_mixer("lightning", 16, depth=2)

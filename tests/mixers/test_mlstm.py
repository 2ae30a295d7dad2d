"""mLSTM against its equations, and against transformers' xLSTM layer with the weights copied."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.mlstm import CAP, EPS


def build(dim: int, dtype: torch.dtype, gates: float = 1.0, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("mlstm", dim, **options).to(dtype)
    with torch.no_grad():
        m.norm_weight.uniform_(0.5, 1.5)
        for gate in (m.input_gate, m.forget_gate):
            gate.weight.normal_(0, gates)
            gate.bias.normal_(0, gates)
    return m


def definition(m: Any, x: Tensor, C: Tensor, n: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The equations of the file's opening lines, token by token."""
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    q = q / math.sqrt(m.N)
    i, f = (CAP * torch.tanh(gate(x) / CAP) for gate in (m.input_gate, m.forget_gate))
    f, outputs = torch.sigmoid(f).log(), []
    for t in range(x.shape[1]):
        before, s = s, torch.maximum(f[:, t] + s, i[:, t])
        keep, add = (f[:, t] + before - s).exp()[..., None], (i[:, t] - s).exp()[..., None]
        C = keep[..., None] * C + add[..., None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        n = keep * n + add * k[:, t]
        weight = torch.maximum((n * q[:, t]).sum(-1).abs(), (-s).exp()) + EPS
        outputs.append((C * q[:, t, :, None, :]).sum(-1) / weight[..., None])
    h = F.layer_norm(torch.stack(outputs, 1), (m.P,), eps=m.norm_eps).flatten(2)
    y = m.out_proj(h * m.norm_weight * torch.sigmoid(m.output_gate(x)))
    return y, {"S": torch.cat([C, n[:, :, None]], 2), "log_scale": s}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dim", "length", "options"),
    [(16, 257, {}), (24, 63, {"heads": 3, "expand_k": 1, "expand_v": 2, "chunk": 8}), (16, 63, {"gates": 10.0})],
)
@pytest.mark.oracle("definition: token by token", "mlstm")
def test_against_definition(
    same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    C = torch.randn(batch, m.heads, m.P, m.N, dtype=torch.float64)
    n, s = torch.randn(batch, m.heads, m.N, dtype=torch.float64), torch.randn(batch, m.heads, dtype=torch.float64)
    got = m(x, {"S": torch.cat([C, n[:, :, None]], 2), "log_scale": s})
    same_as(m, x, got, definition(m, x, C, n, s))


@pytest.mark.oracle("transformers: xLSTMLayer", "mlstm")
def test_against_transformers(held: Any) -> None:
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if xlstm.external_xlstm:
        pytest.skip("transformers would run the xlstm package in place of its own layer")
    dim, heads = 32, 4
    config = xlstm.xLSTMConfig(
        hidden_size=dim,
        num_heads=heads,
        num_hidden_layers=1,
        weight_mode="single",
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="train",
        autocast_kernel_dtype="float32",
        return_last_states=True,
        chunk_size=16,
    )
    theirs = xlstm.xLSTMLayer(config)
    m = build(dim, torch.float32, heads=heads, norm_eps=config.norm_eps)
    pairs = {
        "q": m.q_proj,
        "k": m.k_proj,
        "v": m.v_proj,
        "ogate_preact": m.output_gate,
        "igate_preact": m.input_gate,
        "fgate_preact": m.forget_gate,
        "out_proj": m.out_proj,
    }
    with torch.no_grad():
        for name, mine in pairs.items():
            getattr(theirs, name).load_state_dict(mine.state_dict())
        theirs.multihead_norm.weight.copy_(m.norm_weight)
    x = torch.randn(2, 64, dim, requires_grad=True)
    want, (C, n, s) = theirs(x)
    got, state = m(x)
    held(x, (got, state), (want, [torch.cat([C.mT, n[:, :, None]], 2), s.view(2, heads)]))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["S"], torch.cat([C.mT, n[:, :, None]], 2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["log_scale"], s.view(2, heads), rtol=1e-4, atol=1e-4)
    dy = torch.randn(got.shape)
    mine, other = (torch.autograd.grad(t, x, dy)[0] for t in (got, want))
    torch.testing.assert_close(mine / other.abs().max(), other / other.abs().max(), rtol=0, atol=1e-3)


def test_a_document_forgets_the_units_of_the_one_before() -> None:
    m = build(16, torch.float64, gates=10.0)
    x = torch.randn(1, 63, 16, dtype=torch.float64)
    layout = Layout(resets=torch.zeros(1, 63, dtype=torch.bool).index_fill(1, torch.tensor([30]), True))
    y, state = m(x, None, layout)
    alone, last = m(x[:, 30:])
    torch.testing.assert_close((y[:, 30:], state), (alone, last))


def test_initial_gates() -> None:
    m: Any = create_mixer("mlstm", 64)
    x = torch.randn(1, 3, 64)
    torch.testing.assert_close(m.input_gate(x), torch.full((1, 3, 4), -10.0))
    torch.testing.assert_close(m.forget_gate(x)[0, 0], torch.tensor([3.0, 4.0, 5.0, 6.0]))


def test_defaults_at_any_width_and_state_bytes() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("mlstm", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)
    with pytest.raises(ValueError, match="do not divide into 3 heads"):
        create_mixer("mlstm", 16, heads=3)

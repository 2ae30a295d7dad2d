"""minGRU, minLSTM and RG-LRU against their recurrences and other people's code with the weights copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Mixer, create_mixer, state_bytes
from mmlong.mixers import blocks as blocks_module
from mmlong.mixers.gated_recurrence import RGLRU, ROOT_FLOOR, MinGRU, MinLSTM, _root

NAMES = ("min_gru", "min_lstm", "rg_lru")


def mixer(name: str, dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    made = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def g(u: Tensor) -> Tensor:
    return torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def minimal(m: MinGRU | MinLSTM, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the file's opening lines, token by token."""
    h, outputs = x.new_zeros(x.shape[0], m.inner), []
    for t in range(x.shape[1]):
        c, *gates = m.in_proj(x[:, t]).chunk(1 + m.gates, dim=-1)
        c = g(c) if m.candidate == "positive" else c
        if isinstance(m, MinGRU):
            z = torch.sigmoid(gates[0])
            h = (1 - z) * h + z * c
        else:
            f, i = (torch.sigmoid(gate) for gate in gates)
            h = f / (f + i) * h + i / (f + i) * c
        outputs.append(m.out_proj(h))
    return torch.stack(outputs, 1), h


def griffin(m: RGLRU, x: Tensor) -> tuple[Tensor, Tensor]:
    w_gate, w_u = m.in_proj.weight.chunk(2)
    bias = x.new_zeros(2 * m.inner) if m.in_proj.bias is None else m.in_proj.bias
    b_gate, b_u = bias.chunk(2)
    u = F.pad(x @ w_u.t() + b_u, (0, 0, m.d_conv - 1, 0))
    u = sum(u[:, k : k + x.shape[1]] * m.conv_weight[:, k] for k in range(m.d_conv)) + m.conv_bias
    width = m.inner // m.blocks
    w_r, w_i = (torch.block_diag(*part) for part in m.gate_weight.split(width, dim=-1))
    b_r, b_i = (part.flatten() for part in m.gate_bias.split(width, dim=-1))
    h, outputs = x.new_zeros(x.shape[0], m.inner), []
    gate = m.activation(x @ w_gate.t() + b_gate)
    for t in range(x.shape[1]):
        r, i = torch.sigmoid(u[:, t] @ w_r + b_r), torch.sigmoid(u[:, t] @ w_i + b_i)
        a = torch.exp(-8 * r * torch.log(1 + m.Lambda.exp()))
        h = a * h + (torch.sqrt(1 - a * a) if t else 1) * i * u[:, t]
        outputs.append(m.out_proj(gate[:, t] * h))
    return torch.stack(outputs, 1), h


def definition(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the last ``h``."""
    return griffin(m, x) if isinstance(m, RGLRU) else minimal(m, x)


@pytest.mark.parametrize("length", [63, 257])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("min_gru", {}),
        ("min_gru", {"candidate": "positive", "expand": 1.5}),
        ("min_lstm", {}),
        ("min_lstm", {"candidate": "positive"}),
        ("rg_lru", {}),
        ("rg_lru", {"blocks": 3, "expand": 1.5, "d_conv": 3}),
        ("rg_lru", {"bias": True, "activation": "gelu_tanh"}),
    ],
)
@pytest.mark.oracle("definition: token by token")
def test_against_the_definition(held: Any, name: str, options: dict[str, Any], length: int) -> None:
    m = mixer(name, 8, **options)
    x = torch.randn(3, length, 8, dtype=torch.float64, requires_grad=True)
    (y, state), (want, h) = m(x), definition(m, x)
    held(x, (y, state["h"]), (want, h))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(want)
    leaves = [x, *m.parameters()]
    mine, theirs = (torch.autograd.grad(t, leaves, dy) for t in (y, want))
    for key, a, b in zip(["x", *[n for n, _ in m.named_parameters()]], mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("laid", [False, True])
def test_blocks_equal_whole(monkeypatch: pytest.MonkeyPatch, name: str, laid: bool) -> None:
    m = mixer(name, 8)
    x = torch.randn(3, 700, 8, dtype=torch.float64, requires_grad=True)
    layout = None
    if laid:
        resets = torch.zeros(3, 700, dtype=torch.bool)
        resets[0, [0, 255, 256, 300]] = True
        resets[2, [511, 399]] = True
        layout = Layout(torch.tensor([700, 0, 400]), resets)
    _, state = m(torch.randn(3, 5, 8, dtype=torch.float64))
    state = {key: t.detach().requires_grad_() for key, t in state.items()}
    results = []
    for tokens in (1 << 30, 256):
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(blocks_module, "BLOCK_TOKENS", tokens)
        y, after = m(x, state, layout)
        assert ("Blockwise" in y.grad_fn.name()) == (tokens == 256)
        y = y if layout is None else torch.where(layout.valid(700)[..., None], y, 0)
        total = y.sin().sum() + sum(t.sin().sum() for t in after.values())
        leaves = [x, *(t for key, t in state.items() if key != "begun"), *m.parameters()]
        results.append([y, *after.values(), *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
@pytest.mark.oracle({"min_gru": "minGRU-pytorch: minGRU", "min_lstm": "minGRU-pytorch: minLSTM"})
def test_against_min_gru_pytorch(held: Any, name: str) -> None:
    """Their parallel form runs in logarithms, and so only with positive candidates; states one token at a time too."""
    cell = "minGRU" if name == "min_gru" else "minLSTM"
    code = pytest.importorskip(f"minGRU_pytorch.{cell}")
    m = mixer(name, 8, expand=2, candidate="positive")
    theirs = getattr(code, cell)(8, expansion_factor=2.0, proj_out=True)
    theirs = theirs.double()
    into = theirs.to_hidden_and_gate if name == "min_gru" else theirs.to_hidden_and_f_i_gate
    with torch.no_grad():
        m.in_proj.bias.zero_()
        into.weight.copy_(m.in_proj.weight)
        theirs.to_out.weight.copy_(m.out_proj.weight)
    x = torch.randn(3, 129, 8, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    want, last = theirs(x, return_next_prev_hidden=True)
    held(x, (y, state["h"]), (want, last[:, 0]))
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["h"], last[:, 0], rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, *m.parameters()], dy)
    other = torch.autograd.grad(want, [x, into.weight, theirs.to_out.weight], dy)
    for a, b in zip((mine[0], mine[1], mine[3]), other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    token = x[:, :1].detach()
    torch.testing.assert_close(m(token, state)[0], theirs(token, last), rtol=1e-9, atol=1e-9)


def recurrent_gemma(m: RGLRU, dtype: torch.dtype) -> nn.Module:
    code = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = code.RecurrentGemmaConfig(
        hidden_size=m.dim,
        lru_width=m.inner,
        num_attention_heads=m.blocks,
        conv1d_width=m.d_conv,
        hidden_activation="gelu",
        num_hidden_layers=1,
    )
    theirs = code.RecurrentGemmaRecurrentBlock(config, 0).to(dtype)
    w_gate, w_u = m.in_proj.weight.chunk(2)
    width = m.inner // m.blocks
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()  # the projections' biases
        theirs.linear_y.weight.copy_(w_gate)
        theirs.linear_x.weight.copy_(w_u)
        theirs.linear_out.weight.copy_(m.out_proj.weight)
        theirs.conv_1d.weight.copy_(m.conv_weight[:, None])
        theirs.conv_1d.bias.copy_(m.conv_bias)
        theirs.rg_lru.recurrent_param.copy_(m.Lambda)
        theirs.rg_lru.recurrent_gate_weight.copy_(m.gate_weight[..., :width])
        theirs.rg_lru.input_gate_weight.copy_(m.gate_weight[..., width:])
        theirs.rg_lru.recurrent_gate_bias.copy_(m.gate_bias[..., :width])
        theirs.rg_lru.input_gate_bias.copy_(m.gate_bias[..., width:])
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.oracle("transformers: RecurrentGemmaRecurrentBlock", "rg_lru")
def test_against_recurrent_gemma(held: Any, dtype: torch.dtype) -> None:
    """Their recurrence runs in float32 whatever the input, which bounds the agreement."""
    m = mixer("rg_lru", 8, dtype, blocks=2)
    theirs = recurrent_gemma(m, dtype)
    x = torch.randn(2, 65, 8, dtype=dtype, requires_grad=True)
    places = torch.arange(65).expand(2, -1).clone()
    places[1, 40:] -= 40  # a second document, which only their recurrence sees
    y, state = m(x[:1])
    want, _ = theirs(x[:1], places[:1], None, use_cache=False)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    held(x, (y, state["h"]), (want, theirs.rg_lru.recurrent_states.to(dtype)))
    torch.testing.assert_close(state["h"], theirs.rg_lru.recurrent_states.to(dtype), rtol=1e-4, atol=1e-5)
    leaves = [x, m.Lambda, m.gate_weight, m.in_proj.weight, m.conv_weight]
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, leaves, dy)
    r = theirs.rg_lru
    found = torch.autograd.grad(
        want,
        [x, r.recurrent_param, r.recurrent_gate_weight, r.input_gate_weight, theirs.linear_y.weight, theirs.linear_x.weight, theirs.conv_1d.weight],
        dy,
    )  # fmt: skip
    other = [found[0], found[1], torch.cat(found[2:4], -1), torch.cat(found[4:6]), found[6][:, 0]]
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    resets = (places == 0)[1:]
    theirs.rg_lru.recurrent_states = None
    m_no_conv = mixer(
        "rg_lru", 8, dtype, blocks=2, d_conv=1
    )  # no convolution, which theirs carries over a document's beginning
    theirs = recurrent_gemma(m_no_conv, dtype)
    y, _ = m_no_conv(x[1:], None, Layout(resets=resets))
    want, _ = theirs(x[1:], places[1:], None, use_cache=False)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_first_token_of_a_document_is_not_scaled() -> None:
    """Also that of a row that was empty before, and not that of one that goes on."""
    m = mixer("rg_lru", 4)
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    _, state = m(x, None, Layout(torch.tensor([0, 1])))
    assert state["begun"].tolist() == [0, 1]
    y, state = m(x, state)
    torch.testing.assert_close(y[:1], m(x[:1])[0])
    assert state["begun"].tolist() == [1, 1]
    fresh, _ = m(x, state, Layout(resets=torch.tensor([[True], [False]])))
    torch.testing.assert_close(fresh[:1], m(x[:1])[0])
    assert not torch.allclose(fresh[1:], m(x[1:])[0])


def test_initial_decays_lie_in_the_ring() -> None:
    torch.manual_seed(0)
    m = RGLRU(4096, blocks=64)
    a = torch.exp(-8 * F.softplus(m.Lambda.detach().double()))
    assert 0.9 <= float(a.min()) < 0.901
    assert 0.998 < float(a.max()) <= 0.999 + 1e-6
    assert abs(float(a.mean()) - 0.9495) < 2e-3
    assert abs(float(a.std()) - 0.099 / 12**0.5) < 2e-3
    assert abs(float(m.gate_weight.detach().std()) - 64**-0.5) < 2e-3
    assert abs(float(m.in_proj.weight.detach().std()) - 4096**-0.5) < 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_extreme_gates_stay_finite(name: str) -> None:
    """Gates driven to +-1e3 and beyond: decays of exactly 0 and 1, no NaN in any gradient."""
    m: Mixer = mixer(name, 16, torch.float32)
    for scale in (1e3, 1e6):
        x = (scale * torch.randn(2, 130, 16)).requires_grad_()
        y, state = m(x)
        found = torch.autograd.grad(y.sum() + state["h"].sum(), [x, *m.parameters()])
        assert all(t.isfinite().all() for t in (y, state["h"], *found))


def test_root() -> None:
    x = torch.tensor([0.0, 1e-12, ROOT_FLOOR, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    y = _root(x)
    torch.testing.assert_close(y[2:], x[2:].sqrt())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert float(slope.max()) <= 2000 * (1 + 1e-9)
    assert slope.isfinite().all()


def test_state_bytes_and_impossible_options() -> None:
    for name in NAMES:
        for dim in (1, 3, 64, 128):
            m = create_mixer(name, dim)
            assert state_bytes(m(torch.randn(1, 5, dim))[1]) == m.state_bytes(5)
    with pytest.raises(ValueError, match="unknown candidate 'tanh'"):
        create_mixer("min_gru", 8, candidate="tanh")
    with pytest.raises(ValueError, match="no channel"):
        create_mixer("min_lstm", 8, expand=0)
    with pytest.raises(ValueError, match="into 3 blocks"):
        create_mixer("rg_lru", 8, blocks=3)

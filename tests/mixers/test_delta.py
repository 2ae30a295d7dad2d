"""DeltaNet, Gated DeltaNet and KDA against their recurrences and against transformers' layers with the weights copied."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers import delta as module
from mmlong.mixers.delta import DeltaMixer

NAMES = ("deltanet", "gated_deltanet", "kda")


def mixer(name: str, dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> DeltaMixer:
    torch.manual_seed(0)
    made = create_mixer(name, dim, **options).to(dtype)
    assert isinstance(made, DeltaMixer)
    with torch.no_grad():
        made.norm_weight.uniform_(0.5, 1.5)
        for parameter, value in made.named_parameters():
            if parameter == "dt_bias":
                value.add_(2)  # faster decays than at the start of training, so that they matter
            elif parameter != "norm_weight" and value.ndim == 2:
                value.mul_(2)
    return made


def recurrence(m: DeltaMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the file's opening lines, token by token and step by step."""
    B, L, _ = x.shape
    H, N, P, n = m.heads, m.N, m.P, m.steps
    padded = F.pad(x @ m.qkv_proj.weight.T, (0, 0, m.d_conv - 1, 0))
    u = F.silu(sum(padded[:, i : i + L] * m.conv_weight[:, i] for i in range(m.d_conv)))
    q, k, v = u.split([H * N, n * H * N, n * H * P], -1)
    q, k, v = q.view(B, L, H, N), k.view(B, L, n, H, N), v.view(B, L, n, H, P)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = (x @ m.beta_proj.weight.T).sigmoid().view(B, L, n, H) * (2 if m.negative_eigenvalues else 1)
    a = x.new_ones(B, L, H, 1)
    z = None
    if isinstance(m, module.GatedDeltaNet):
        a = (-m.A_log.exp() * F.softplus(x @ m.decay_proj.weight.T + m.dt_bias)).exp()[..., None]
        z = F.silu(x @ m.gate_proj.weight.T)
    elif isinstance(m, module.KDA):
        raw = F.softplus(x @ m.decay_down.weight.T @ m.decay_up.weight.T + m.dt_bias).view(B, L, H, N)
        a = (-m.A_log.exp()[:, None] * raw).exp()
        z = (x @ m.gate_down.weight.T @ m.gate_up.weight.T).sigmoid()
    S, outputs = x.new_zeros(B, H, N, P), []
    for t in range(L):
        S = a[:, t, :, :, None] * S
        for j in range(n):
            missing = v[:, t, j] - torch.einsum("bhnp,bhn->bhp", S, k[:, t, j])
            S = S + torch.einsum("bhn,bhp->bhnp", k[:, t, j], beta[:, t, j, :, None] * missing)
        outputs.append(torch.einsum("bhnp,bhn->bhp", S, q[:, t]) * N**-0.5)
    y = torch.stack(outputs, 1)
    y = (m.norm_weight * y / (y.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()).flatten(2)
    return (y if z is None else y * z) @ m.out_proj.weight.T, S


@pytest.mark.parametrize(
    ("dim", "batch", "length", "options"),
    [
        (16, 3, 63, {}),
        (8, 1, 130, {"heads": 2, "expand_k": 1, "expand_v": 0.5, "chunk": 16}),
        (8, 1, 33, {"heads": 2, "expand_k": 1, "steps": 3, "negative_eigenvalues": True, "d_conv": 2, "chunk": 16}),
        (1, 2, 9, {}),
    ],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.oracle("definition: token by token")
def test_against_recurrence(
    same_as: Callable[..., None], name: str, dim: int, batch: int, length: int, options: dict[str, Any]
) -> None:
    m = mixer(name, dim, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    want, S = recurrence(m, x)
    same_as(m, x, (y, {"S": state["S"]}), (want, {"S": S}))


def qwen3_next(m: DeltaMixer, dtype: torch.dtype) -> tuple[nn.Module, dict[str, tuple[Tensor, Any]], Any]:
    """transformers' layer with the weights of ``m``, parameters of both that correspond (and how theirs is read), and a cache."""
    code = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = code.Qwen3NextConfig(
        hidden_size=m.dim,
        linear_num_value_heads=m.heads,
        linear_num_key_heads=m.heads,
        linear_key_head_dim=m.N,
        linear_value_head_dim=m.P,
        linear_conv_kernel_dim=m.d_conv,
        rms_norm_eps=m.norm_eps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = code.Qwen3NextGatedDeltaNet(config, layer_idx=0).to(dtype).eval()
    H, N, P = m.heads, m.N, m.P

    def heads_together(*parts: Tensor) -> Tensor:
        """Theirs lists a head's queries, keys, values and gates, then the next head's."""
        return torch.cat([t.unflatten(0, (H, -1)) for t in parts], 1).flatten(0, 1)

    with torch.no_grad():
        q, k, v = m.qkv_proj.weight.split([m.keys, m.keys, m.values])
        theirs.in_proj_qkvz.weight.copy_(heads_together(q, k, v, m.gate_proj.weight))
        theirs.in_proj_ba.weight.copy_(heads_together(m.beta_proj.weight, m.decay_proj.weight))
        theirs.conv1d.weight.copy_(m.conv_weight[:, None])
        theirs.dt_bias.copy_(m.dt_bias)
        theirs.A_log.copy_(m.A_log)
        theirs.norm.weight.copy_(m.norm_weight)
        theirs.out_proj.weight.copy_(m.out_proj.weight)

    def qkv(t: Tensor) -> Tensor:
        parts = t.unflatten(0, (H, -1)).split([N, N, P, P], 1)[:3]
        return torch.cat([part.flatten(0, 1) for part in parts])

    pairs = {
        "A_log": (theirs.A_log, lambda t: t),
        "dt_bias": (theirs.dt_bias, lambda t: t),
        "qkv_proj.weight": (theirs.in_proj_qkvz.weight, qkv),
        "beta_proj.weight": (theirs.in_proj_ba.weight, lambda t: t.view(H, 2, -1)[:, 0]),
        "conv_weight": (theirs.conv1d.weight, lambda t: t[:, 0]),
        "norm_weight": (theirs.norm.weight, lambda t: t),
    }
    return theirs, pairs, code.DynamicCache(config=config)


def kimi_linear(m: DeltaMixer, dtype: torch.dtype) -> tuple[nn.Module, dict[str, tuple[Tensor, Any]], Any]:
    code = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = code.KimiLinearConfig(
        hidden_size=m.dim,
        linear_num_heads=m.heads,
        linear_head_dim=m.N,
        linear_conv_kernel_dim=m.d_conv,
        rms_norm_eps=m.norm_eps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = code.KimiLinearDeltaAttention(config, layer_idx=0).to(dtype).eval()
    with torch.no_grad():
        q, k, v = m.qkv_proj.weight.split([m.keys, m.keys, m.values])
        for linear, weight in (
            (theirs.q_proj, q),
            (theirs.k_proj, k),
            (theirs.v_proj, v),
            (theirs.b_proj, m.beta_proj.weight),
            (theirs.forget_gate.f_a_proj, m.decay_down.weight),
            (theirs.forget_gate.f_b_proj, m.decay_up.weight),
            (theirs.g_a_proj, m.gate_down.weight),
            (theirs.g_b_proj, m.gate_up.weight),
            (theirs.o_proj, m.out_proj.weight),
        ):
            linear.weight.copy_(weight)
        theirs.conv1d.weight.copy_(m.conv_weight[:, None])
        theirs.forget_gate.dt_bias.copy_(m.dt_bias)
        theirs.forget_gate.A_log.copy_(m.A_log.view(1, 1, -1, 1))
        theirs.o_norm.weight.copy_(m.norm_weight)
    pairs = {
        "A_log": (theirs.forget_gate.A_log, torch.flatten),
        "dt_bias": (theirs.forget_gate.dt_bias, lambda t: t),
        "decay_up.weight": (theirs.forget_gate.f_b_proj.weight, lambda t: t),
        "gate_down.weight": (theirs.g_a_proj.weight, lambda t: t),
        "beta_proj.weight": (theirs.b_proj.weight, lambda t: t),
        "conv_weight": (theirs.conv1d.weight, lambda t: t[:, 0]),
        "norm_weight": (theirs.o_norm.weight, lambda t: t),
    }
    return theirs, pairs, code.DynamicCache(config=config)


ORACLES = {"gated_deltanet": qwen3_next, "kda": kimi_linear}
NAMED = {
    "gated_deltanet": "transformers: Qwen3NextGatedDeltaNet",
    "kda": "transformers: KimiLinearDeltaAttention",
}


@pytest.fixture(autouse=True)
def theirs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own torch code, where it would call kernels of fla, which need a GPU."""
    names = {
        "qwen3_next": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        "kimi_linear": ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    }
    for family, functions in names.items():
        code = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        for function in functions:
            monkeypatch.setattr(code, function, inspect.unwrap(getattr(code, function)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", list(ORACLES))
@pytest.mark.oracle(NAMED)
def test_against_transformers(held: Any, name: str, heads: int, dtype: torch.dtype) -> None:
    """Their recurrence runs in float32 whatever the input, which bounds the agreement."""
    m = mixer(name, 16, dtype, heads=heads)
    theirs, pairs, _ = ORACLES[name](m, dtype)
    x = torch.randn(2, 65, 16, dtype=dtype, requires_grad=True)
    y, want = m(x)[0], theirs(x)
    held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, *(dict(m.named_parameters())[n] for n in pairs)], dy)
    other = torch.autograd.grad(want, [x, *(t for t, _ in pairs.values())], dy)
    reads = [lambda t: t, *(read for _, read in pairs.values())]
    for part, a, b, read in zip(["x", *pairs], mine, other, reads, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(
            a, read(b), rtol=1e-3, atol=1e-4 * scale, msg=lambda text, n=part: f"gradient of {n}: {text}"
        )


@pytest.mark.parametrize("name", list(ORACLES))
@pytest.mark.oracle(NAMED)
def test_state_against_transformers_cache(held: Any, name: str) -> None:
    m = mixer(name, 16, torch.float32, heads=2)
    theirs, _, cache = ORACLES[name](m, torch.float32)
    x = torch.randn(2, 37, 16)
    with torch.no_grad():
        theirs(x[:, :30], cache)
        y, state = m(x[:, :30])
        torch.testing.assert_close(state["S"], cache.get_recurrent_state(0), rtol=1e-4, atol=1e-5)
        for t in range(30, 37):
            want = theirs(x[:, t : t + 1], cache)
            y, state = m(x[:, t : t + 1], state)
            held(x, (y, state["S"]), (want, cache.get_recurrent_state(0)))
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["S"], cache.get_recurrent_state(0), rtol=1e-4, atol=1e-5)


@pytest.mark.oracle("fla: delta_rule_recurrence", "deltanet")
def test_deltanet_around_flas_recurrence(held: Any) -> None:
    """The layer's own code written out around ``fla``'s definition of the recurrence."""
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    m = mixer("deltanet", 16, torch.float32, heads=2)
    x = torch.randn(2, 45, 16, requires_grad=True)
    u = F.conv1d(F.pad((x @ m.qkv_proj.weight.T).mT, (3, 0)), m.conv_weight[:, None], groups=m.conv_dim).mT
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in F.silu(u).chunk(3, -1))
    beta = (x @ m.beta_proj.weight.T).sigmoid().mT
    q, k = (F.normalize(t, dim=-1, eps=1e-6) for t in (q, k))
    want, S = naive.delta_rule_recurrence(q, k, v, beta)
    want = F.rms_norm(want.transpose(1, 2), (m.P,), m.norm_weight, m.norm_eps).flatten(2) @ m.out_proj.weight.T
    y, state = m(x)
    held(x, (y, state["S"]), (want, S))
    torch.testing.assert_close((y, state["S"]), (want, S), rtol=1e-3, atol=1e-4)
    dy = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(t, [x, m.qkv_proj.weight, m.beta_proj.weight], dy) for t in (y, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_equal_whole(request: pytest.FixtureRequest, blocks_equal_whole: Any, name: str, steps: int) -> None:
    m = mixer(name, 8, heads=2, expand_k=1, chunk=8, steps=steps)
    blocks_equal_whole(m, lambda: request.getfixturevalue("in_small_blocks"))


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_in_blocks(name: str) -> None:
    m = mixer(name, 16, torch.float32)
    x = torch.randn(2, 150, 16, requires_grad=True)
    want, _ = m(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = m(x)
    assert state["S"].dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.05 * float(want.detach().abs().max()))
    (a,), (b,) = (torch.autograd.grad(t.float().square().sum(), x) for t in (y, want))
    assert float((a - b).norm() / b.norm()) < 0.1


def test_a_rate_of_two_keeps_parity() -> None:
    """Every one reflects the state (Grazzi et al. 2024): its sign is the parity of the ones so far."""
    k = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(1, 9, 1, 4)
    ones = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1]], dtype=torch.float64)
    start = torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    start[..., 0, 0] = 1.0
    nothing = torch.zeros(1, 9, 1, 1, dtype=torch.float64)
    signs, _ = module.delta_rule(k, k, nothing, 2 * ones[..., None], state=start)
    torch.testing.assert_close(signs.flatten(), (-1.0) ** ones.cumsum(1).flatten())


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_transition_turns_only_with_negative_eigenvalues(name: str, negative: bool) -> None:
    m = mixer(name, 16, expand_k=1, expand_v=1, negative_eigenvalues=negative)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        m.beta_proj.weight.copy_(50 * x[0])  # the rate is at its upper end
    _, state = m(x)
    states = [{**state, "S": S} for S in (torch.eye(16, dtype=torch.float64)[None, None], torch.zeros_like(state["S"]))]
    kept, lost = (m(x, before)[1]["S"][0, 0] for before in states)
    eigenvalue = float(torch.linalg.eigvals((kept - lost).detach()).real.min())
    assert (eigenvalue < -1e-3) == negative
    assert eigenvalue > -1 - 1e-9


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_initial_values(name: str) -> None:
    torch.manual_seed(0)
    m = create_mixer(name, 512, heads=128, expand_k=1, expand_v=1)
    A, dt = m.A_log.exp(), F.softplus(m.dt_bias)
    low = 0.01 if name == "gated_deltanet" else 1.0
    assert float(A.min()) >= low
    assert float(A.max()) <= 16
    torch.testing.assert_close(float(A.mean()), (16 + low) / 2, rtol=0.12, atol=0)
    assert float(dt.min()) >= 0.99e-3
    assert float(dt.max()) <= 1.01e-1
    torch.testing.assert_close(float(dt.log10().mean()), -2.0, rtol=0.1, atol=0)
    assert (m.norm_weight == 1).all()
    torch.testing.assert_close(float(m.qkv_proj.weight.std()), (3 * 512) ** -0.5, rtol=0.02, atol=0)
    assert float(m.conv_weight.abs().max()) <= 0.5


@pytest.mark.parametrize("name", NAMES)
def test_defaults_at_any_width_and_state_bytes(name: str) -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer(name, dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)
    assert create_mixer("gated_deltanet", 256).heads == 3
    assert create_mixer("kda", 256).heads == 4


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="into 3 heads"):
        create_mixer("deltanet", 16, heads=3)
    with pytest.raises(ValueError, match="at least 1"):
        create_mixer("deltanet", 16, steps=0)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("kda", 16, causal=False)

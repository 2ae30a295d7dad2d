"""Mamba against its recurrence and against other people's mixers with the weights copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import Mamba, create_mixer, state_bytes


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba:
    torch.manual_seed(0)
    made = create_mixer("mamba", dim, **options).to(dtype)
    assert isinstance(made, Mamba)
    with torch.no_grad():
        made.D.uniform_(-1, 1)
        made.A_log.add_(0.1 * torch.randn_like(made.A_log))
        made.dt_bias.add_(2)  # faster decays than at the start of training, so that they matter
    return made


def recurrence(m: Mamba, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the file's opening lines, token by token."""
    batch, L, _ = x.shape
    u, z = m.in_proj(x).chunk(2, -1)
    padded = F.pad(u, (0, 0, m.d_conv - 1, 0))
    u = F.silu(sum(padded[:, i : i + L] * m.conv_weight[:, i] for i in range(m.d_conv)) + m.conv_bias)
    r, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], -1)
    dt = F.softplus(r @ m.dt_proj.weight.t() + m.dt_bias)
    A, h, outputs = -m.A_log.exp(), x.new_zeros(batch, m.inner, m.d_state), []
    for t in range(L):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + m.D * u[:, t])
    return m.out_proj(torch.stack(outputs, 1) * F.silu(z)), h


@pytest.mark.parametrize(
    ("dim", "length", "options"), [(16, 63, {}), (6, 257, {"expand": 1.5, "d_state": 3, "dt_rank": 2, "d_conv": 3})]
)
@pytest.mark.oracle("definition: token by token", "mamba")
def test_against_the_definition(held: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(3, length, dim, dtype=torch.float64, requires_grad=True)
    (y, state), (want, h) = m(x), recurrence(m, x)
    held(x, (y, state["ssm"].mT), (want, h))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(want), [x, *m.parameters()]
    mine, theirs = (torch.autograd.grad(t, leaves, dy) for t in (y, want))
    for key, a, b in zip(["x", *[n for n, _ in m.named_parameters()]], mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda t, k=key: f"{k}: {t}")


def copy_into(m: Mamba, theirs: Any) -> None:
    with torch.no_grad():
        for name in ("in_proj", "x_proj", "out_proj", "dt_proj"):
            getattr(theirs, name).weight.copy_(getattr(m, name).weight)
        theirs.dt_proj.bias.copy_(m.dt_bias)
        theirs.conv1d.weight.copy_(m.conv_weight[:, None])
        theirs.conv1d.bias.copy_(m.conv_bias)
        theirs.A_log.copy_(m.A_log)
        theirs.D.copy_(m.D)


def compare(held: Any, m: Mamba, theirs: Any, x: Tensor, y: Tensor, want: Tensor) -> None:
    """Both compute in float32 inside, which bounds the agreement."""
    held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [x, m.A_log, m.dt_bias, m.D, m.x_proj.weight, m.conv_weight], dy)
    other = torch.autograd.grad(
        want, [x, theirs.A_log, theirs.dt_proj.bias, theirs.D, theirs.x_proj.weight, theirs.conv1d.weight], dy
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.oracle("transformers: MambaMixer", "mamba")
def test_against_transformers_with_its_cache(held: Any) -> None:
    code = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    m = mixer(16, torch.float32)
    config = code.MambaConfig(
        hidden_size=16,
        state_size=16,
        expand=2,
        conv_kernel=4,
        time_step_rank=m.dt_rank,
        use_bias=False,
        use_conv_bias=True,
        num_hidden_layers=1,
    )
    theirs = code.MambaMixer(config, layer_idx=0).eval()
    copy_into(m, theirs)
    x = torch.randn(2, 37, 16, requires_grad=True)
    y, _ = m(x)
    compare(held, m, theirs, x, y, theirs(x))
    cache = code.DynamicCache(config=config)
    with torch.no_grad():
        want = theirs(x[:, :30], cache)
        start, state = m(x[:, :30])
        held(x, (start, state["ssm"].mT), (want, cache.layers[0].recurrent_states[0]))
        torch.testing.assert_close(state["ssm"].mT, cache.layers[0].recurrent_states[0], rtol=1e-4, atol=1e-5)
        for t in range(30, 33):
            token, state = m(x[:, t : t + 1], state)
            torch.testing.assert_close(token, theirs(x[:, t : t + 1], cache), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(token, y[:, t : t + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.oracle("mambapy: MambaBlock", "mamba")
def test_against_mambapy(held: Any) -> None:
    code = pytest.importorskip("mambapy.mamba")
    m = mixer(16, torch.float32)
    theirs = code.MambaBlock(code.MambaConfig(d_model=16, n_layers=1, dt_rank=m.dt_rank))
    copy_into(m, theirs)
    x = torch.randn(2, 63, 16, requires_grad=True)
    compare(held, m, theirs, x, m(x)[0], theirs(x))


def test_initial_values() -> None:
    torch.manual_seed(0)
    m = Mamba(2048)
    assert m.dt_rank == 128
    dt = F.softplus(m.dt_bias.detach())
    assert 1e-3 * (1 - 1e-4) <= float(dt.min()) < 1.1e-3
    assert 0.095 < float(dt.max()) <= 0.1 * (1 + 1e-4)
    assert abs(float(dt.log().mean()) + 4.605) < 0.05  # log-uniform: the mean of log 1e-3 and log 1e-1
    torch.testing.assert_close(m.A_log.detach().exp()[7], torch.arange(1.0, 17.0))
    spread = m.dt_proj.weight.detach()
    assert abs(float(spread.std()) - 128**-0.5 / 3**0.5) < 1e-3
    assert bool((m.D == 1).all())


def test_state_bytes_and_impossible_options() -> None:
    for dim in (1, 3, 40):
        m = create_mixer("mamba", dim)
        assert state_bytes(m(torch.randn(1, 3, dim))[1]) == m.state_bytes(3)
    for options in ({"expand": 0}, {"d_state": 0}, {"dt_rank": 0}, {"d_conv": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            create_mixer("mamba", 8, **options)

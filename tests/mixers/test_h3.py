"""H3 against its state spaces simulated: scipy's bilinear rule, shift matrices, outer products token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from mmlong.mixers import H3, create_mixer, state_bytes

Discrete = tuple[Tensor, Tensor]


def mixer(dim: int, **options: Any) -> H3:
    torch.manual_seed(0)
    made = create_mixer("h3", dim, **options).double()
    assert isinstance(made, H3)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
        made.log_dt.add_(2)  # steps at which the rule of discretisation matters
    return made


@torch.no_grad()
def discrete(m: H3, head: int) -> Discrete:
    """Of a head, by scipy: the real state matrix ``(N, N)``, a block of two a mode, and the input's column ``(N,)``."""
    blocks = []
    for mode in range(m.d_state // 2):
        re, im = -math.exp(m.log_A_real[head, mode]), float(m.A_imag[head, mode])
        blocks.append([[re, -im], [im, re]])
    A = scipy.linalg.block_diag(*blocks)
    B = np.tile([[1.0], [0.0]], (m.d_state // 2, 1))
    system = (A, B, np.zeros((1, m.d_state)), np.zeros((1, 1)))
    Ad, Bd, *_ = scipy.signal.cont2discrete(system, math.exp(m.log_dt[head]), method="bilinear")
    return torch.from_numpy(Ad), torch.from_numpy(Bd[:, 0])


def simulate(m: H3, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The file's opening lines, states as vectors and matrices, one token after another; states as the mixer's."""
    (B, L, D), N, H, d = x.shape, m.d_state, m.heads, m.head_dim
    moved = torch.eye(N, dtype=x.dtype).roll(1, 0)
    moved[0, -1] = 0
    first, taps = torch.eye(N, dtype=x.dtype)[0], m.shift.flip(1)  # the readout, nearest lag first
    systems = [discrete(m, head) for head in range(H)]
    readouts = torch.stack([2 * m.C[..., 0], -2 * m.C[..., 1]], -1).flatten(1)
    shifted = x.new_zeros(B, D, N)
    state = [x.new_zeros(B, d, d, N) for _ in range(H)]
    outputs = []
    for t in range(L):
        q, k, v = m.in_proj(x[:, t]).chunk(3, -1)
        shifted = shifted @ moved.T + k[..., None] * first
        k = (shifted * taps).sum(-1)
        q, k, v = (a.view(B, H, d) for a in (q, k, v))
        heads = []
        for i, (Ad, Bd) in enumerate(systems):
            Z = k[:, i, :, None] * v[:, i, None, :]
            state[i] = state[i] @ Ad.T + Z[..., None] * Bd
            Y = state[i] @ readouts[i] + m.D[i] * Z
            heads.append((q[:, i, None, :] @ Y)[:, 0])
        outputs.append(m.out_proj(torch.cat(heads, -1)))
    h = torch.view_as_complex(torch.stack(state, 3).view(B, d * d, H, N // 2, 2))
    b = torch.view_as_complex(torch.stack([Bd for _, Bd in systems]).view(H, N // 2, 2))
    return torch.stack(outputs, 1), {
        "shift": shifted[..., :-1].flip(-1).transpose(1, 2),
        "h": torch.view_as_real(h / b),
    }


@pytest.mark.parametrize(
    ("dim", "length", "options"),
    [
        (3, 63, {"d_state": 8}),
        (2, 20, {"d_state": 64, "init": "inv"}),
        (6, 77, {"d_state": 4, "head_dim": 3, "chunk": 16, "init": "legs"}),
    ],
)
@pytest.mark.oracle("scipy: cont2discrete, stepped by matrices", "h3")
def test_against_simulation(held: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    (y, state), (want, left) = m(x), simulate(m, x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    assert isinstance(state, dict)
    held(x, (y, [state[name] for name in left]), (want, list(left.values())))
    for name, expected in left.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-9, atol=1e-9)
    assert state_bytes(state) == 2 * 2 * m.state_bytes(length)  # two rows in float64
    weights = torch.randn_like(y)
    # What scipy discretised is a constant there.
    leaves = [x, m.in_proj.weight, m.shift, m.C, m.D, m.out_proj.weight]
    found, expected = (torch.autograd.grad((t * weights).sum(), leaves) for t in (y, want))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_recall_of_a_shifted_key() -> None:
    """The paper's reading: a key one token late meets its value, and a query for the key reads the value back."""
    m = mixer(8, d_state=2, head_dim=8)
    names, values = torch.eye(8)[:4].double(), torch.eye(8)[4:].double()
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.in_proj.weight[:8, :4] = m.in_proj.weight[8:16, :4] = torch.eye(8)[:, :4]
        m.in_proj.weight[16:, 4:] = torch.eye(8)[:, 4:]
        m.shift[:, 0] = 1
        m.log_A_real.fill_(-20)
        m.C[..., 0] = 0.5
        m.out_proj.weight.copy_(torch.eye(8))
        y, _ = m(torch.stack([names[1], values[3], names[0], values[2], names[1]])[None])
    assert int(y[0, -1].argmax()) == 4 + 3
    torch.testing.assert_close(y[0, -1], values[3], rtol=1e-6, atol=1e-6)


def test_initial_values() -> None:
    torch.manual_seed(0)
    m = H3(512, d_state=16)
    assert float(m.shift.detach()[:, :-1].abs().max()) <= 0.25
    assert abs(float(m.shift.detach()[:, :-1].std()) - 0.25 / 3**0.5) < 0.003
    assert abs(float(m.shift.detach()[:, -1].std()) - (1 + 0.25**2 / 3) ** 0.5) < 0.1
    dt = m.log_dt.detach().exp()
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 1e-1 * 1.001
    assert abs(float(m.log_dt.detach().mean()) - math.log(1e-2)) < 0.2
    torch.testing.assert_close(m.log_A_real.detach().exp(), torch.full((512, 8), 0.5))
    torch.testing.assert_close(m.A_imag.detach()[7], math.pi * torch.arange(8.0))
    assert abs(float(m.C.detach().square().sum(-1).mean()) - 1) < 0.05
    assert abs(float(m.D.detach().std()) - 1) < 0.1


def test_a_mode_of_no_memory_is_finite() -> None:
    """dt A = -2 makes the bilinear mode zero."""
    m = H3(2, d_state=2).double()
    with torch.no_grad():
        m.log_dt.fill_(math.log(4))
        m.log_A_real.fill_(math.log(0.5))
        m.A_imag.fill_(1e-9)
        y, state = m(torch.randn(1, 9, 2, dtype=torch.float64))
    assert y.isfinite().all()
    assert isinstance(state, dict)
    assert state["h"].isfinite().all()


def test_impossible_options_are_refused() -> None:
    for options, words in (
        ({"d_state": 7}, "h3: d_state must be even .* got 7"),
        ({"d_state": 0}, "h3: d_state .* got 0"),
        ({"head_dim": 3}, "h3: head_dim must divide dim 4, got 3"),
        ({"head_dim": 0}, "h3: head_dim"),
        ({"init": "hippo"}, "h3: unknown init 'hippo'"),
        ({"dt_min": 0.0}, "h3: steps .* got 0.0"),
        ({"dt_min": 0.2}, "h3: steps .* got 0.2 and 0.1"),
        ({"chunk": 0}, "h3: chunk .* got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer("h3", 4, **options)
    with pytest.raises(ValueError, match="causal only"):
        create_mixer("h3", 4, causal=False)

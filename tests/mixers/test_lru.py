"""LRU and S5 against their recurrences, scipy's simulation, and other people's code with the weights copied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import LRU, S5, create_mixer, state_bytes
from mmlong.mixers.hippo import hippo_modes


def mixer(name: str, dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer(name, dim, **options).double()


def complex_(t: Tensor) -> np.ndarray:
    return torch.view_as_complex(t.detach()).numpy()


def finish(m: LRU | S5, x: Tensor, y: np.ndarray) -> Tensor:
    g = F.gelu(torch.from_numpy(y) + m.D * x)
    u = F.linear(g, m.out_proj.weight, m.out_proj.bias)
    return F.glu(u, -1) if isinstance(m, LRU) else g * torch.sigmoid(u)


def simulated_lru(m: LRU, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``Re(C h)`` by scipy's filter, and the last ``h``."""
    lam = np.exp(-np.exp(m.nu_log.detach().numpy()) + 1j * np.exp(m.theta_log.detach().numpy()))
    w = np.exp(m.gamma_log.detach().numpy()) * (x.detach().numpy() @ complex_(m.B).T)
    h = np.stack([scipy.signal.lfilter([1.0], [1.0, -lam[n]], w[..., n], axis=1) for n in range(m.modes)], -1)
    return (h @ complex_(m.C)[0].T).real, h[:, -1]


def simulated_s5(m: S5, x: np.ndarray, side: int = 0) -> np.ndarray:
    """``(L, D)``: the real system of twice the modes, held by scipy for each mode's own step."""
    lam = m.Lambda_re.detach().numpy() + 1j * m.Lambda_im.detach().numpy()
    B, C, y = complex_(m.B), complex_(m.C)[side], np.zeros_like(x)
    for n in range(m.modes):
        A = np.array([[lam[n].real, -lam[n].imag], [lam[n].imag, lam[n].real]])
        into, out = np.stack([B[n].real, B[n].imag]), 2 * np.stack([C[:, n].real, -C[:, n].imag], 1)
        system = (A, into, out, np.zeros((m.dim, m.dim)))
        Ad, Bd, Cd, _, _ = scipy.signal.cont2discrete(system, math.exp(float(m.log_step[n])), method="zoh")
        state = np.zeros(2)
        for t in range(len(x)):
            state = Ad @ state + Bd @ x[t]
            y[t] += Cd @ state
    return y


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"d_state": 11, "r_min": 0.0, "max_phase": 0.3}])
@pytest.mark.oracle("scipy: lfilter", "lru")
def test_lru_against_scipy(held: Any, options: dict[str, Any]) -> None:
    m = mixer("lru", 6, **options)
    x = torch.randn(3, 257, 6, dtype=torch.float64)
    y, state = m(x)
    want, last = simulated_lru(m, x)
    held(x, (y, state), (finish(m, x, want), torch.view_as_real(torch.from_numpy(last))))
    torch.testing.assert_close(y, finish(m, x, want), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(torch.view_as_complex(state["h"]).numpy(), last, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"d_state": 12, "blocks": 3}])
@pytest.mark.oracle("scipy: cont2discrete, stepped", "s5")
def test_s5_against_scipy(held: Any, options: dict[str, Any]) -> None:
    m = mixer("s5", 6, **options)
    x = torch.randn(2, 63, 6, dtype=torch.float64)
    want = np.stack([simulated_s5(m, row) for row in x.numpy()])
    y, _ = m(x)
    held(x, (y, None), (finish(m, x, want), None))
    torch.testing.assert_close(y, finish(m, x, want), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_s5_two_sides_against_scipy_with_padding_and_documents() -> None:
    m = mixer("s5", 4, causal=False)
    x = torch.randn(2, 60, 4, dtype=torch.float64)
    resets = torch.zeros(2, 60, dtype=torch.bool)
    resets[0, 31] = resets[1, 50] = True
    y, state = m(x, None, Layout(torch.tensor([60, 43]), resets))
    assert state is None
    for row, start, stop in ((0, 0, 31), (0, 31, 60), (1, 0, 43)):
        part = x[row, start:stop]
        want = simulated_s5(m, part.numpy()) + simulated_s5(m, part.numpy()[::-1], 1)[::-1]
        torch.testing.assert_close(y[row, start:stop], finish(m, part, want), rtol=1e-9, atol=1e-9)


@pytest.mark.oracle("lru-pytorch: LRU", "lru")
def test_against_lru_pytorch(held: Any) -> None:
    """Their D is a matrix, which here is diagonal. They keep results in float32, which bounds the agreement."""
    code = pytest.importorskip("LRU_pytorch")
    m = mixer("lru", 5, d_state=7).float()
    theirs = code.LRU(5, 5, 7)
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log"):
            getattr(theirs, name).copy_(getattr(m, name))
        theirs.B.copy_(torch.view_as_complex(m.B))
        theirs.C.copy_(torch.view_as_complex(m.C[0]))
        theirs.D.copy_(torch.diag(m.D))
    x = torch.randn(2, 40, 5, requires_grad=True)
    y, want = m(x)[0], m.finish(F.gelu(theirs(x)))
    held(x, (y, None), (want, None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    names = ("nu_log", "theta_log", "gamma_log")
    mine = torch.autograd.grad(y, [x, m.B, m.C, *(getattr(m, n) for n in names)], dy)
    found = torch.autograd.grad(want, [x, theirs.B, theirs.C, *(getattr(theirs, n) for n in names)], dy)
    other = [found[0], torch.view_as_real(found[1]), torch.view_as_real(found[2])[None], *found[3:]]
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("s5-pytorch: S5", "s5")
def test_against_s5_pytorch(held: Any, causal: bool) -> None:
    """They keep all modes, of which the pairs here are written out."""
    code = pytest.importorskip("s5.s5_model")
    m = mixer("s5", 4, d_state=6, causal=causal).float()
    theirs = code.S5(4, 6, bidir=not causal)
    both = lambda t, axis: torch.cat([t, t.conj()], axis)  # noqa: E731
    with torch.no_grad():
        lam = torch.complex(m.Lambda_re, m.Lambda_im)
        theirs.seq.Lambda.copy_(both(lam, 0))
        theirs.seq.B.copy_(torch.view_as_real(both(torch.view_as_complex(m.B), 0).resolve_conj()))
        theirs.seq.C.copy_(torch.cat([both(side, 1) for side in torch.view_as_complex(m.C)], 1))
        theirs.seq.D.copy_(m.D)
        theirs.seq.log_step.copy_(m.log_step.repeat(2))
    x = torch.randn(2, 65, 4, requires_grad=True)
    y, state = m(x)
    if causal:
        want, last = theirs(x, return_state=True)
        torch.testing.assert_close(torch.view_as_complex(state["h"]), last[:, :3], rtol=1e-4, atol=1e-5)
    else:
        want = theirs(x)
    want = m.finish(F.gelu(want))
    held(x, (y, state), (want, torch.view_as_real(last[:, :3]) if causal else None))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    (a, c), (b, d) = (
        torch.autograd.grad(y, [x, m.log_step], dy),
        torch.autograd.grad(want, [x, theirs.seq.log_step], dy),
    )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    torch.testing.assert_close(c, d[:3] + d[3:], rtol=1e-3, atol=1e-4 * float(d.abs().max()))


def test_lru_starts_in_its_ring() -> None:
    torch.manual_seed(0)
    m = LRU(4, d_state=20_000, r_min=0.4, r_max=0.9, max_phase=1.0)
    lam, _, _ = m.discretise(torch.float64)
    square, phase = lam.detach().abs().square(), lam.detach().angle()
    assert 0.16 - 1e-5 <= float(square.min()) < 0.161
    assert 0.809 < float(square.max()) <= 0.81 + 1e-5
    assert abs(float(square.mean()) - 0.485) < 0.005  # uniform in area
    assert abs(float(square.std()) - 0.65 / 12**0.5) < 0.005
    assert abs(float(phase.mean()) - 0.5) < 0.01
    assert 0 < float(phase.min()) < 0.001 < 0.999 < float(phase.max()) <= 1 + 1e-5
    gamma = m.gamma_log.detach().double().exp()
    torch.testing.assert_close(gamma, (1 - square).sqrt(), rtol=1e-4, atol=1e-4)


def test_lru_states_start_at_the_size_of_the_input() -> None:
    """White noise of variance 1 gives every mode variance 1, whatever its size: what gamma is for."""
    torch.manual_seed(0)
    m = LRU(64, r_min=0.5, r_max=0.99)
    lam, b, _ = m.discretise(torch.float64)
    power = (b.detach().abs().square().sum(1) / (1 - lam.detach().abs().square())).mean()
    assert abs(float(power) - 1) < 0.05


def test_s5_starts_at_hippo() -> None:
    torch.manual_seed(0)
    m = S5(64, d_state=16, blocks=2)
    n = np.arange(8)
    root = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    values = np.linalg.eigvals(A + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5)))
    np.testing.assert_allclose(values.real, -0.5, atol=1e-10)
    positive = np.sort(values.imag[values.imag > 0])
    np.testing.assert_allclose(m.Lambda_im.detach().numpy(), np.tile(positive, 2), rtol=1e-6)
    np.testing.assert_allclose(m.Lambda_re.detach().numpy(), -0.5, rtol=1e-6)
    steps = m.log_step.detach().exp()
    assert 1e-3 <= float(steps.min()) <= float(steps.max()) <= 1e-1
    # The columns of a random matrix in an orthonormal basis keep their size: half of it for one of each pair.
    assert abs(float(torch.view_as_complex(m.B.detach()).abs().square().sum()) - 8) < 1.5


def test_hippo_eigenvectors() -> None:
    values, vectors = hippo_modes(10)
    n = torch.arange(10, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.outer(root, root).tril(-1) - torch.diag(n + 1) + torch.outer(root, root) / 2
    torch.testing.assert_close(A.to(values.dtype) @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(5, dtype=values.dtype))


@pytest.mark.parametrize("name", ["lru", "s5"])
def test_state_bytes_and_any_width(name: str) -> None:
    for dim in (1, 3, 16):
        m = create_mixer(name, dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3)


def test_slow_modes_stay_stable() -> None:
    """Whatever training does to the parameters, no mode grows."""
    m = S5(4)
    with torch.no_grad():
        m.Lambda_re.fill_(3.0)
    assert float(m.discretise(torch.float32)[0].abs().max().detach()) < 1
    lru = LRU(4)
    with torch.no_grad():
        lru.nu_log.fill_(-80.0)
    assert float(lru.discretise(torch.float32)[0].abs().max().detach()) <= 1


def test_impossible_options_are_refused() -> None:
    for name, options, words in (
        ("lru", {"d_state": 0}, "at least 1"),
        ("lru", {"r_min": 0.9, "r_max": 0.5}, "r_min < r_max"),
        ("lru", {"causal": False}, "causal only"),
        ("s5", {"d_state": 6, "blocks": 2}, "blocks of even size"),
        ("s5", {"dt_min": 0.0}, "dt_min"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer(name, 4, **options)

"""S4 against scipy's bilinear rule and simulation, the paper's own kernel, its definition with full matrices, and HiPPO-LegS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import S4, create_mixer
from mmlong.mixers.hippo import hippo_legs, hippo_low_rank, hippo_modes
from mmlong.ops.state_space import state_space


def make(dim: int, **options: Any) -> S4:
    """Away from the initial values, with steps at which the rule of discretisation matters."""
    torch.manual_seed(0)
    mixer = S4(dim, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        mixer.log_dt.add_(2)
    return mixer


def both(pairs: Tensor) -> Tensor:
    """All N numbers of one of each conjugate pair."""
    z = torch.view_as_complex(pairs)
    return torch.cat([z, z.conj()], -1)


def continuous(mixer: S4) -> tuple[Tensor, Tensor]:
    """``A (D, N, N)`` and ``B (D, N)``, complex, in the basis of all N modes."""
    lam = both(torch.stack([-mixer.log_A_real.exp(), mixer.A_imag], -1))
    p = both(mixer.P)
    return torch.diag_embed(lam) - p[:, :, None] * p.conj()[:, None], both(mixer.B)


def finish(mixer: S4, x: Tensor, y: Tensor) -> Tensor:
    return F.glu(mixer.out_proj(F.gelu(y + mixer.D * x)), dim=-1)


def real_system(mixer: S4, d: int, side: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a channel: the system turned back into the basis that HiPPO is written in, where it is real; its ``A, B, C``, and the basis."""
    A, B = continuous(mixer)
    v = hippo_modes(mixer.d_state)[1]
    basis = torch.cat([v, v.conj()], 1).numpy()
    turned = (
        basis @ A[d].numpy() @ basis.conj().T,
        basis @ B[d].numpy(),
        both(mixer.C)[side, d].numpy() @ basis.conj().T,
    )
    assert max(np.abs(t.imag).max() for t in turned) < 1e-12
    return (*(t.real for t in turned), basis)


@pytest.mark.oracle("scipy: cont2discrete, dlsim", "s4")
def test_against_scipy(held: Any) -> None:
    mixer = make(3, d_state=8).requires_grad_(False)
    x = torch.randn(2, 257, 3, dtype=torch.float64, requires_grad=True)
    toeplitz, states = [], torch.zeros(2, 3, 4, dtype=torch.complex128)
    for d in range(3):
        A, B, C, basis = real_system(mixer, d)
        dt = math.exp(mixer.log_dt[d])
        Ad, Bd, *_ = scipy.signal.cont2discrete((A, B[:, None], C[None], np.zeros((1, 1))), dt, method="bilinear")
        discrete = (Ad, Bd, C[None], np.zeros((1, 1)), dt)
        # scipy reads the state before a token: the response after it is one later.
        impulse = scipy.signal.dlsim(discrete, np.eye(258)[0])[1][1:, 0]
        toeplitz.append(scipy.linalg.toeplitz(impulse, np.zeros(257)))
        for b in range(2):
            u = np.append(x[b, :, d].detach().numpy(), 0)
            last = scipy.signal.dlsim(discrete, u)[2][-1]
            states[b, d] = torch.from_numpy(basis.conj().T @ last)[:4]
    expected = finish(mixer, x, torch.einsum("dts,bsd->btd", torch.from_numpy(np.stack(toeplitz)), x))
    y, state = mixer(x)
    held(x, (y, state["h"]), (expected, torch.view_as_real(states)))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["h"], torch.view_as_real(states), rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-8, atol=1e-8)


@pytest.mark.oracle("definition: full matrices, token by token", "s4")
def test_all_gradients_of_the_definition(same_as: Any) -> None:
    mixer = make(2, d_state=6, chunk=8)
    x = torch.randn(2, 37, 2, dtype=torch.float64, requires_grad=True)
    A, B = continuous(mixer)
    dt, eye = mixer.log_dt.exp()[:, None, None], torch.eye(6, dtype=A.dtype)
    step = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    into = torch.linalg.solve(eye - dt / 2 * A, dt * B[..., None])[..., 0]
    h, outputs = torch.zeros(2, 2, 6, dtype=A.dtype), []
    for t in range(37):
        h = (step @ h[..., None])[..., 0] + into * x[:, t, :, None]
        outputs.append((both(mixer.C)[0] * h).sum(-1).real)
    expected = finish(mixer, x, torch.stack(outputs, 1))
    same_as(mixer, x, mixer(x), (expected, {"h": torch.view_as_real(h[..., :3].resolve_conj())}), 1e-9)


@torch.no_grad()
def test_the_paper_s_kernel() -> None:
    """Algorithm 1: the truncated generating function at the roots of unity, by Woodbury's identity and Cauchy products, and an inverse FFT."""
    mixer, L = make(2, d_state=16), 128
    A, B = continuous(mixer)
    lam, p, C = both(torch.stack([-mixer.log_A_real.exp(), mixer.A_imag], -1)), both(mixer.P), both(mixer.C)[0]
    dt, eye = mixer.log_dt.exp(), torch.eye(16, dtype=A.dtype)
    step = torch.linalg.solve(eye - dt[:, None, None] / 2 * A, eye + dt[:, None, None] / 2 * A)
    # Half a step off the roots of unity, at one of which 1 + z is 0: z^L is -1 here, and the kernel comes out times a phase.
    truncated = (C[:, None] @ (eye + torch.linalg.matrix_power(step, L)))[:, 0]
    shift = torch.exp(torch.tensor(-1j * math.pi / L, dtype=A.dtype))
    z = shift * torch.exp(-2j * math.pi * torch.arange(L, dtype=torch.float64) / L)
    at = 2 / dt[:, None] * (1 - z) / (1 + z)

    def cauchy(left: Tensor, right: Tensor) -> Tensor:
        return ((left * right)[:, None] / (at[..., None] - lam[:, None])).sum(-1)

    inner = cauchy(truncated, B) - cauchy(truncated, p) * cauchy(p.conj(), B) / (1 + cauchy(p.conj(), p))
    kernel = torch.fft.ifft(2 / (1 + z) * inner) * shift ** -torch.arange(L)
    impulse = torch.zeros(1, L, 2, dtype=torch.float64)
    impulse[:, 0] = 1
    found, _ = mixer.run(impulse, mixer.discretise(torch.float64), 0, None, None)
    torch.testing.assert_close(found[0].T, kernel.real, rtol=1e-9, atol=1e-9)
    assert float(kernel.imag.abs().max()) < 1e-9


def test_hippo_is_diagonal_and_rank_one() -> None:
    N = 64
    A = np.zeros((N, N))
    for n in range(N):
        for k in range(N):
            A[n, k] = -((2 * n + 1) ** 0.5) * (2 * k + 1) ** 0.5 if n > k else (-(n + 1) if n == k else 0)
    found, column = hippo_legs(N)
    np.testing.assert_allclose(found, A, rtol=1e-14)
    np.testing.assert_allclose(column, (2 * np.arange(N) + 1) ** 0.5)
    lam, p, b = hippo_low_rank(N)
    assert lam.shape == p.shape == b.shape == (N // 2,)
    assert float(lam.imag.min()) > 0
    assert bool((lam.imag.diff() > 0).all())
    vectors = hippo_modes(N)[1]
    V = torch.cat([vectors, vectors.conj()], 1).numpy()
    np.testing.assert_allclose(V.conj().T @ V, np.eye(N), atol=1e-12)
    lam, p, b = (torch.cat([t, t.conj()]).numpy() for t in (lam, p, b))
    np.testing.assert_allclose(V @ (np.diag(lam) - np.outer(p, p.conj())) @ V.conj().T, A, atol=1e-10)
    np.testing.assert_allclose(V @ b, column, atol=1e-12)
    # A is triangular: its eigenvalues are -1 .. -N. At a size where they can be computed at all, they are.
    lam, p, _ = (torch.cat([t, t.conj()]).numpy() for t in hippo_low_rank(8))
    eigenvalues = np.linalg.eigvals(np.diag(lam) - np.outer(p, p.conj()))
    np.testing.assert_allclose(np.sort(eigenvalues.real), np.arange(-8, 0), atol=1e-8)


def test_initial_values() -> None:
    torch.manual_seed(0)
    mixer = S4(512)
    low, high = math.log(1e-3), math.log(1e-1)
    assert scipy.stats.kstest(mixer.log_dt.detach().numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert scipy.stats.kstest(mixer.C.detach().flatten()[:20000].numpy(), "norm", (0, 0.5**0.5)).pvalue > 1e-3
    assert scipy.stats.kstest(mixer.D.detach().numpy(), "norm").pvalue > 1e-3
    # Every channel starts as HiPPO-LegS itself.
    A, B = continuous(mixer.double())
    vectors = hippo_modes(64)[1]
    V = torch.cat([vectors, vectors.conj()], 1)
    legs, column = hippo_legs(64)
    for d in (0, 511):
        # float32 parameters, the largest entry being 126.
        torch.testing.assert_close(V @ A[d] @ V.mH, legs.to(A.dtype), rtol=0, atol=2e-5)
        torch.testing.assert_close(V @ B[d], column.to(A.dtype), rtol=0, atol=2e-5)


@torch.no_grad()
def test_no_parameters_make_it_unstable() -> None:
    """The transition shortens every state: A plus its adjoint is negative, which the bilinear rule keeps."""
    torch.manual_seed(0)
    mixer = S4(64, d_state=16).double()
    for p in mixer.parameters():
        p.copy_(3 * torch.randn_like(p))
    assert float(torch.linalg.matrix_norm(mixer.discretise(torch.float64).transition(), 2).max()) <= 1 + 1e-12


@torch.no_grad()
def test_two_sides_with_padding_and_documents() -> None:
    mixer = make(2, causal=False, d_state=4, chunk=8)
    x = torch.randn(2, 90, 2, dtype=torch.float64)
    resets = torch.zeros(2, 90, dtype=torch.bool)
    resets[0, 31] = resets[1, 70] = True
    y, state = mixer(x, None, Layout(torch.tensor([90, 63]), resets))
    assert state is None
    kernels = np.zeros((2, 2, 90))
    for side, d in np.ndindex(2, 2):
        A, B, C, _ = real_system(mixer, d, side)
        Ad, Bd, *_ = scipy.signal.cont2discrete(
            (A, B[:, None], C[None], np.zeros((1, 1))), math.exp(mixer.log_dt[d]), method="bilinear"
        )
        for lag in range(90):
            kernels[side, d, lag] = (C @ np.linalg.matrix_power(Ad, lag) @ Bd)[0]
    for row, start, stop in ((0, 0, 31), (0, 31, 90), (1, 0, 63)):
        n, part = stop - start, x[row, start:stop]
        expected = torch.zeros_like(part)
        for t, i in np.ndindex(n, n):
            k = kernels[0, :, t - i] if i <= t else kernels[1, :, i - t - 1]
            expected[t] += torch.from_numpy(k) * part[i]
        torch.testing.assert_close(y[row, start:stop], finish(mixer, part, expected), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_token_by_its_structure_is_the_matrix() -> None:
    mixer = make(3, d_state=8)
    x, h = torch.randn(2, 1, 3, dtype=torch.float64), torch.randn(2, 3, 4, 2, dtype=torch.float64)
    system = mixer.discretise(torch.float64)
    for strict in (False, True):
        y, after = mixer.run(x, system, 0, h, None, strict)
        dense = state_space(
            x, system.transition(), system.b.flatten(1), system.c[0].flatten(1), h.flatten(2), None, strict
        )
        torch.testing.assert_close(y, dense[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after.flatten(2), dense[1], rtol=1e-12, atol=1e-12)


def test_impossible_options_are_refused() -> None:
    for options, words in (({"d_state": 7}, "even"), ({"chunk": 0}, "chunk"), ({"dt_min": 0.0}, "dt_min")):
        with pytest.raises(ValueError, match=words):
            create_mixer("s4", 4, **options)

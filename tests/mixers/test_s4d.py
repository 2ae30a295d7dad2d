"""S4D against a simulation of the continuous system by scipy, its initial values, and its two kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from mmlong.layout import Layout
from mmlong.mixers import S4D, create_mixer
from mmlong.mixers.state_space import Init, initial_frequencies


def kernels(mixer: S4D, length: int) -> np.ndarray:
    """Impulse responses ``(1 or 2, D, length)`` of the continuous systems held by scipy: real blocks of each conjugate pair, ZOH."""
    found = np.zeros((mixer.C.shape[0], mixer.dim, length))
    for side in range(mixer.C.shape[0]):
        for d in range(mixer.dim):
            blocks, reads = [], []
            for m in range(mixer.d_state // 2):
                re, im = -math.exp(mixer.log_A_real[d, m]), float(mixer.A_imag[d, m])
                blocks.append([[re, -im], [im, re]])
                reads += [2 * float(mixer.C[side, d, m, 0]), -2 * float(mixer.C[side, d, m, 1])]
            A = scipy.linalg.block_diag(*blocks)
            B = np.tile([[1.0], [0.0]], (mixer.d_state // 2, 1))
            system = (A, B, np.array([reads]), np.zeros((1, 1)))
            Ad, Bd, Cd, _, _ = scipy.signal.cont2discrete(system, math.exp(mixer.log_dt[d]), method="zoh")
            state = Bd[:, 0]
            for t in range(length):
                found[side, d, t] = Cd[0] @ state
                state = Ad @ state
    return found


def last_states(mixer: S4D, x: np.ndarray) -> torch.Tensor:
    """The modes' responses to ``x`` as they stand at its end, each mode's column of B being one: ``(B, D, N/2, 2)``."""
    A = np.exp(mixer.log_dt.numpy())[:, None] * (-np.exp(mixer.log_A_real.numpy()) + 1j * mixer.A_imag.numpy())
    h = np.zeros((len(x), *A.shape), dtype=complex)
    for d, m in np.ndindex(*A.shape):
        h[:, d, m] = scipy.signal.lfilter([1.0], [1.0, -np.exp(A[d, m])], x[..., d], axis=1)[:, -1]
    return torch.view_as_real(torch.from_numpy(h))


def finish(mixer: S4D, x: torch.Tensor, y: np.ndarray | torch.Tensor) -> torch.Tensor:
    u = torch.as_tensor(y) + mixer.D * x
    return F.glu(mixer.out_proj(F.gelu(u)), dim=-1)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@pytest.mark.oracle("scipy: cont2discrete", "s4d")
def test_against_scipy(held: Any, init: Init) -> None:
    torch.manual_seed(0)
    mixer = S4D(3, d_state=8, init=init).double().requires_grad_(False)
    x = torch.randn(2, 257, 3, dtype=torch.float64, requires_grad=True)
    toeplitz = np.stack([scipy.linalg.toeplitz(k, np.zeros(257)) for k in kernels(mixer, 257)[0]])
    expected = finish(mixer, x, torch.einsum("dts,bsd->btd", torch.from_numpy(toeplitz), x))
    (y, state), left = mixer(x), last_states(mixer, x.detach().numpy())
    held(x, (y, state["h"]), (expected, left))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["h"], left, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_two_sides_against_scipy_with_padding_and_documents() -> None:
    torch.manual_seed(0)
    mixer = S4D(2, causal=False, d_state=4).double()
    x = torch.randn(2, 90, 2, dtype=torch.float64)
    resets = torch.zeros(2, 90, dtype=torch.bool)
    resets[0, 31] = resets[1, 70] = True
    y, state = mixer(x, None, Layout(torch.tensor([90, 63]), resets))
    assert state is None
    ahead, back = kernels(mixer, 90)
    for row, start, stop in ((0, 0, 31), (0, 31, 90), (1, 0, 63)):
        part, n = x[row, start:stop], stop - start
        expected = np.zeros((n, 2))
        for t in range(n):
            for i in range(n):
                k = ahead[:, t - i] if i <= t else back[:, i - t - 1]
                expected[t] += k * part[i].numpy()
        torch.testing.assert_close(y[row, start:stop], finish(mixer, part, expected), rtol=1e-9, atol=1e-9)


def test_initial_frequencies() -> None:
    torch.testing.assert_close(initial_frequencies("lin", 8), math.pi * torch.arange(4, dtype=torch.float64))
    n = np.arange(4)
    np.testing.assert_allclose(initial_frequencies("inv", 8), 8 / np.pi * (8 / (2 * n + 1) - 1))
    # HiPPO-LegS itself, element by element, made normal by the rank-one part that the paper names.
    N = 8
    A = np.zeros((N, N))
    for i in range(N):
        for k in range(N):
            A[i, k] = -((2 * i + 1) ** 0.5) * (2 * k + 1) ** 0.5 if i > k else (-(i + 1) if i == k else 0)
    P = (np.arange(N) + 0.5) ** 0.5
    eigenvalues = np.linalg.eigvals(A + np.outer(P, P))
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-10)
    positive = np.sort(eigenvalues.imag[eigenvalues.imag > 0])
    np.testing.assert_allclose(initial_frequencies("legs", N), positive, rtol=1e-10)


def test_impossible_options_are_refused() -> None:
    for options, words in (({"d_state": 7}, "even"), ({"init": "hippo"}, "unknown init"), ({"dt_min": 0.0}, "dt_min")):
        with pytest.raises(ValueError, match=words):
            create_mixer("s4d", 4, **options)

"""S4 and S4D with two sides: two kernels over the same input, one for each direction, and one output layer after their sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.backbone import create_directed
from mmlong.backbone.directions import Direction
from mmlong.mixers import create_mixer

RULES = {"s4": "bilinear", "s4d": "zoh"}


def kernels(mixer: Any, rule: str, length: int) -> np.ndarray:
    """``(2, D, length)``: responses of the continuous systems, real and imaginary parts as states of their own, discretised by scipy."""
    found = np.zeros((2, mixer.dim, length))
    for d in range(mixer.dim):
        modes = zip(mixer.log_A_real[d].exp().tolist(), mixer.A_imag[d].tolist(), strict=True)
        A = scipy.linalg.block_diag(*([[-re, -im], [im, -re]] for re, im in modes))
        B = np.tile([1.0, 0.0], mixer.d_state // 2)
        if rule == "bilinear":
            p, B = mixer.P[d].flatten().numpy(), mixer.B[d].flatten().numpy()
            A = A - 2 * np.outer(p, p)
        C = (2 * mixer.C[:, d] * torch.tensor([1.0, -1.0])).flatten(1).numpy()
        step = math.exp(mixer.log_dt[d])
        Ad, Bd, *_ = scipy.signal.cont2discrete((A, B[:, None], C, np.zeros((2, 1))), step, method=rule)
        state = Bd[:, 0]
        for lag in range(length):
            found[:, d, lag] = C @ state
            state = Ad @ state
    return found


def around(ahead: Tensor, back: Tensor, x: Tensor) -> Tensor:
    """As the authors compute it: one kernel of twice the length, the second one's mirrored end behind the first, and a circular convolution."""
    L = x.shape[1]
    kernel = F.pad(ahead, (0, L)) + F.pad(back.flip(-1), (L, 0))
    return torch.fft.irfft(torch.fft.rfft(x.mT, 2 * L) * torch.fft.rfft(kernel), 2 * L)[..., :L].mT


@pytest.mark.parametrize("length", [1, 2, 97])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.oracle("scipy: cont2discrete; both kernels in one FFT", name))
        for name in RULES
    ],
)
def test_both_kernels_in_one_circular_convolution(held: Callable[..., None], name: str, length: int) -> None:
    torch.manual_seed(0)
    mixer: Any = create_mixer(name, 3, causal=False, d_state=8, chunk=16).double().requires_grad_(False)
    for p in mixer.parameters():
        p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    ahead, back = torch.from_numpy(kernels(mixer, RULES[name], length))
    sides = around(ahead, back, x)
    expected = F.glu(mixer.out_proj(F.gelu(sides + mixer.D * x)), dim=-1)
    y, state = mixer(x)
    assert state is None
    held(x, (y, None), (expected, None))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_directions_build_it(name: str) -> None:
    """Both ways, and in every block of an alternation, it is one layer of two kernels; causal, of one."""
    cases: list[tuple[Direction, int, int]] = [
        ("both", 0, 2),
        ("alternate", 0, 2),
        ("alternate", 1, 2),
        ("causal", 1, 1),
    ]
    for direction, index, sides in cases:
        mixer: Any = create_directed(name, 4, direction, index)
        assert type(mixer).__name__ == name.upper()
        assert mixer.causal == (direction == "causal")
        assert mixer.C.shape[:2] == (sides, 4)
        assert [n for n, m in mixer.named_modules() if isinstance(m, torch.nn.Linear)] == ["out_proj"]

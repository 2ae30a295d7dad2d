"""S4ND against scipy's zero-order hold and N-d FFT, its definition, its kernels on finer grids, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout, scan_order
from mmlong.mixers import S4ND, create_mixer
from mmlong.mixers import s4nd as module


def make(dim: int, **options: Any) -> S4ND:
    """Away from the initial values, with larger steps and readouts: a product of small kernels would hardly be seen beside the skip."""
    torch.manual_seed(0)
    mixer = S4ND(dim, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        mixer.log_dt.add_(1)
        mixer.C.mul_(3)
    return mixer


def two_sided(mixer: S4ND, axis: int, n: int) -> np.ndarray:
    """Kernels ``(D, 2n - 1)`` at lags ``1 - n .. n - 1``, of the continuous systems held by scipy: real blocks of each conjugate pair."""
    found = np.zeros((mixer.dim, 2 * n - 1))
    for d in range(mixer.dim):
        blocks: list[Any] = []
        for m in range(mixer.d_state // 2):
            re, im = -math.exp(mixer.log_A_real[axis, d, m]), float(mixer.A_imag[axis, d, m])
            blocks.append([[re, -im], [im, re]])
        A, B = scipy.linalg.block_diag(*blocks), np.tile([[1.0], [0.0]], (mixer.d_state // 2, 1))
        C = (2 * mixer.C[:, axis, d] * torch.tensor([1.0, -1.0])).flatten(1).detach().numpy()
        dt = mixer.rate * math.exp(mixer.log_dt[axis, d])
        Ad, Bd, Cd, *_ = scipy.signal.cont2discrete((A, B, C, np.zeros((2, 1))), dt, method="zoh")
        state = Bd[:, 0]
        for lag in range(n):
            ahead, back = Cd @ state
            found[d, n - 1 + lag] = ahead
            if lag < n - 1:
                found[d, n - 2 - lag] = back
            state = Ad @ state
    return found


def finish(mixer: S4ND, x: Tensor, y: Tensor) -> Tensor:
    return F.glu(mixer.out_proj(F.gelu(y + mixer.D * x)), dim=-1)


def by_scipy(mixer: S4ND, image: np.ndarray, grid: tuple[int, ...]) -> Tensor:
    """``(B, cells, D)``, cells in raster order: the whole kernel as an outer product, and scipy's N-d convolution with it."""
    y = np.zeros_like(image)
    axes = (1,) * (mixer.axes - len(grid)) + grid
    kernels = [two_sided(mixer, a, n) for a, n in enumerate(axes)]
    for b, d in np.ndindex(image.shape[0], image.shape[2]):
        kernel = kernels[0][d]
        for k in kernels[1:]:
            kernel = np.multiply.outer(kernel, k[d])
        whole = scipy.signal.fftconvolve(image[b, :, d].reshape(axes), kernel, mode="full")
        y[b, :, d] = whole[tuple(slice(n - 1, 2 * n - 1) for n in axes)].flatten()
    return torch.from_numpy(y)


CASES: list[tuple[int, tuple[int, ...], str]] = [
    (2, (7, 9), "raster"),
    (2, (7, 9), "hilbert"),
    (2, (9, 6), "serpentine"),
    (2, (1, 11), "raster"),
    (2, (13,), "raster"),
    (1, (19,), "raster"),
    (3, (3, 5, 4), "raster"),
    (3, (3, 4, 3), "pixels:hilbert"),
    (3, (5, 7), "random:1"),
]


@pytest.mark.parametrize("matrix", [256, 4])
@pytest.mark.parametrize(("axes", "grid", "order"), CASES)
@pytest.mark.oracle("scipy: cont2discrete, N-d fftconvolve", "s4nd")
def test_against_scipy(
    held: Callable[..., None],
    axes: int,
    grid: tuple[int, ...],
    order: str,
    matrix: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Axes by matrices; and, where ``matrix`` is shorter than they are, by recurrences."""
    monkeypatch.setattr(module, "MATRIX", matrix)
    mixer = make(3, axes=axes, d_state=8, chunk=4 if matrix < 5 else None).requires_grad_(False)
    cells = scan_order(grid, order)
    x = torch.randn(2, math.prod(grid), 3, dtype=torch.float64, requires_grad=True)

    def expect(t: Tensor) -> Tensor:
        image = np.zeros(t.shape)
        image[:, cells] = t.detach().numpy()
        return by_scipy(mixer, image, grid)[:, cells]

    # A convolution is a linear map: its matrix by unit impulses, so that the gradient is scipy's as well.
    L = x.shape[1]
    columns = expect(torch.eye(L, dtype=torch.float64)[..., None].expand(-1, -1, 3))
    expected = finish(mixer, x, torch.einsum("std,bsd->btd", columns, x))
    torch.testing.assert_close(expected, finish(mixer, x, expect(x)), rtol=1e-9, atol=1e-9)
    y, state = mixer(x, None, Layout(grid=grid, order=order))
    assert state is None
    held(x, (y, None), (expected, None))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-8, atol=1e-8)


@pytest.mark.oracle("definition: every pair of cells", "s4nd")
def test_all_gradients_of_the_definition(same_as: Callable[..., None]) -> None:
    mixer, grid = make(2, d_state=6), (4, 5)
    x = torch.randn(2, 20, 2, dtype=torch.float64, requires_grad=True)
    step = torch.exp(mixer.log_dt)[..., None] * torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    into = (step.exp() - 1) / torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)

    def kernel(axis: int, lag: int) -> Tensor:
        side, power = (0, lag) if lag >= 0 else (1, -1 - lag)
        c = torch.view_as_complex(mixer.C[side, axis])
        return 2 * (c * into[axis] * (step[axis] * power).exp()).sum(-1).real

    rows = []
    for r, s in np.ndindex(*grid):
        total = torch.zeros(2, 2, dtype=torch.float64)
        for i, j in np.ndindex(*grid):
            total = total + kernel(0, r - i) * kernel(1, s - j) * x[:, 5 * i + j]
        rows.append(total)
    expected = finish(mixer, x, torch.stack(rows, 1))
    same_as(mixer, x, mixer(x, None, Layout(grid=grid)), (expected, None), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(300, 3), (3, 300), (257, 1)])
def test_an_axis_beyond_the_matrix_limit(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = make(2), torch.randn(1, math.prod(grid), 2, dtype=torch.float64)
    y, _ = mixer(x, None, Layout(grid=grid))
    monkeypatch.setattr(module, "MATRIX", 1000)
    torch.testing.assert_close(y, mixer(x, None, Layout(grid=grid))[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_finer_grid_has_the_same_kernel() -> None:
    """Zero-order hold integrates the kernel over a cell: two cells of half the size have together what one had. Silent modes are the same."""
    mixer = make(4, bandlimit=0.4)
    lam, c = mixer.discretise(torch.float64)
    silent = (c == 0).all(-1)
    turns = (mixer.log_dt.exp()[..., None] * mixer.A_imag).abs() / math.pi
    assert torch.equal(silent, (turns >= 0.4).expand_as(silent))
    assert 0 < int(silent.sum()) < silent.numel()
    coarse = module.diagonal_kernel(lam[0], c[0, 0], 20)
    mixer.rate = 0.5
    lam, c = mixer.discretise(torch.float64)
    assert torch.equal((c == 0).all(-1), silent)
    fine = module.diagonal_kernel(lam[0], c[0, 0], 40)
    torch.testing.assert_close(fine.unflatten(1, (20, 2)).sum(-1), coarse, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_grid_is_read() -> None:
    mixer, x = make(3), torch.randn(1, 24, 3, dtype=torch.float64)
    found = [mixer(x, None, layout)[0] for layout in (None, Layout(grid=(4, 6)), Layout(grid=(6, 4)))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((found[a] - found[b]).abs().max()) > 0.01
    torch.testing.assert_close(found[0], mixer(x, None, Layout(grid=(1, 24)))[0])


def test_initial_values() -> None:
    torch.manual_seed(0)
    mixer = S4ND(512, axes=3)
    low, high = math.log(1e-2), 0.0
    for dt in mixer.log_dt.detach():
        assert scipy.stats.kstest(dt.numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert scipy.stats.kstest(mixer.C.detach().flatten()[:20000].numpy(), "norm", (0, 0.5**0.5)).pvalue > 1e-3
    assert scipy.stats.kstest(mixer.D.detach().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(mixer.log_A_real.exp(), torch.full_like(mixer.log_A_real, 0.5))


def test_impossible_options_and_layouts_are_refused() -> None:
    for options, words in (
        ({"causal": True}, "no causal form"),
        ({"axes": 0}, "axes"),
        ({"rate": 0.0}, "rate"),
        ({"bandlimit": -1.0}, "bandlimit"),
        ({"d_state": 7}, "even"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer("s4nd", 4, **options)
    mixer, x = S4ND(4), torch.randn(2, 12, 4)
    with pytest.raises(ValueError, match="at most 2 axes"):
        mixer(x, None, Layout(grid=(2, 3, 2)))
    with pytest.raises(ValueError, match="not the cells"):
        mixer(x, None, Layout(grid=(4, 4)).slice(2, 14))

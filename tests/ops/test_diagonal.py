"""The diagonal recurrence: chunks against the definition, with everything a layout can say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.diagonal import diagonal_kernel, diagonal_recurrence, diagonal_reference

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(B: int, L: int, D: int = 3, M: int = 5, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lam = torch.stack([-0.1 * normal(D, M).exp(), 2 * normal(D, M)], -1)
    return normal(B, L, D), lam, normal(D, M, 2), normal(B, D, M, 2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 64, 1000])
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 63), (1, 64), (3, 257)])
def test_chunks_equal_the_definition(B: int, L: int, chunk: int, strict: bool) -> None:
    u, lam, c, h = draw(B, L)
    for before in (None, h):
        y, after = diagonal_recurrence(u, lam, c, before, strict=strict, chunk=chunk)
        expected, state = diagonal_reference(u, lam, c, before, strict)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(after, state, rtol=1e-11, atol=1e-11)


def test_the_definition_is_the_real_system_of_twice_the_size() -> None:
    """Each mode and its conjugate as a real 2 x 2 block, stepped by scipy's matrix exponential."""
    u, lam, c, h = draw(1, 20, D=1, M=4)
    y, _ = diagonal_reference(u, lam, c, h)
    block = scipy.linalg.block_diag(*[[[re, -im], [im, re]] for re, im in lam[0].tolist()])
    step = scipy.linalg.expm(block)
    state = h[0, 0].flatten().numpy()
    into = np.tile([1.0, 0.0], 4)
    out = (2 * c[0] * torch.tensor([1.0, -1.0])).flatten().numpy()
    for t in range(20):
        state = step @ state + into * float(u[0, t, 0])
        assert abs(out @ state - float(y[0, t, 0])) < 1e-10


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_lengths_and_resets_are_documents_run_alone(chunk: int) -> None:
    u, lam, c, h = draw(4, 50)
    lengths = [50, 33, 0, 16]
    resets = torch.zeros(4, 50, dtype=torch.bool)
    for row, at in ((0, 0), (0, 16), (0, 17), (0, 49), (1, 5), (1, 40), (2, 0), (3, 8), (3, 20)):
        resets[row, at] = True
    padded = u.clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = float("nan")
    y, after = diagonal_recurrence(padded, lam, c, h, Layout(torch.tensor(lengths), resets), chunk=chunk)
    for b, n in enumerate(lengths):
        state, cuts = h[b : b + 1], [p for p in range(n) if resets[b, p]]
        bounds = sorted({0, *cuts, n})
        for start, stop in itertools.pairwise(bounds):
            first = None if start in cuts else state
            expected, state = diagonal_reference(u[b : b + 1, start:stop], lam, c, first)
            torch.testing.assert_close(y[b : b + 1, start:stop], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(after[b : b + 1], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool, strict: bool) -> None:
    leaves = [t.requires_grad_() for t in draw(2, 11, D=2, M=2)]
    layout = None
    if packed:
        resets = torch.zeros(2, 11, dtype=torch.bool)
        resets[0, [0, 5]] = True
        resets[1, 4] = True
        layout = Layout(torch.tensor([11, 7]), resets)

    def run(u: Tensor, lam: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, after = diagonal_recurrence(u, lam, c, h, layout, strict, 4)
        valid = None if layout is None else layout.valid(11)
        return y if valid is None else y * valid[..., None], after

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 99, 300])
def test_the_kernel_is_the_powers_and_the_response_to_an_impulse(length: int) -> None:
    _, lam, c, _ = draw(1, 1)
    kernel = diagonal_kernel(lam, c, length)
    powers = (torch.view_as_complex(lam)[:, None] * torch.arange(length)[:, None]).exp()
    expected = 2 * (torch.view_as_complex(c)[:, None] * powers).sum(-1).real
    torch.testing.assert_close(kernel, expected, rtol=1e-11, atol=1e-11)
    impulse = torch.zeros(1, length, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    torch.testing.assert_close(kernel.T, diagonal_reference(impulse, lam, c)[0][0], rtol=1e-11, atol=1e-11)


def test_the_kernel_s_gradients() -> None:
    _, lam, c, _ = draw(1, 1, D=2, M=2)
    assert torch.autograd.gradcheck(lambda a, b: diagonal_kernel(a, b, 11), [lam.requires_grad_(), c.requires_grad_()])


def test_shapes_that_do_not_fit_are_named() -> None:
    u, lam, c, h = draw(2, 5)
    with pytest.raises(ValueError, match=r"lam \(2, 5, 2\)"):
        diagonal_recurrence(u, lam[:2], c)
    with pytest.raises(ValueError, match="h is"):
        diagonal_recurrence(u, lam, c, h[:1])

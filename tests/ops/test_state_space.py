"""The dense state space: chunks and doubling against the definition and scipy, with everything a layout can say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.state_space import state_space, state_space_reference

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(B: int, L: int, D: int = 3, N: int = 5, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = normal(D, N, N)
    A = 0.97 * A / torch.linalg.matrix_norm(A, 2, keepdim=True)
    return normal(B, L, D), A, normal(D, N), normal(D, N), normal(B, D, N)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 8, 50, 1000])
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 63), (1, 64), (2, 131)])
def test_chunks_equal_the_definition(B: int, L: int, chunk: int, strict: bool) -> None:
    u, *system, h = draw(B, L)
    for before in (None, h):
        y, after = state_space(u, *system, before, strict=strict, chunk=chunk)
        expected, state = state_space_reference(u, *system, before, strict)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(after, state, rtol=1e-11, atol=1e-11)


def test_the_definition_is_scipys() -> None:
    u, A, B, C, h = draw(1, 40)
    y, _ = state_space_reference(u, A, B, C, h, strict=True)
    for d in range(3):
        # scipy reads the state before the token.
        system = (A[d].numpy(), B[d, :, None].numpy(), C[d, None].numpy(), np.zeros((1, 1)), 1.0)
        _, expected, _ = scipy.signal.dlsim(system, u[0, :, d].numpy(), x0=h[0, d].numpy())
        np.testing.assert_allclose(y[0, :, d], expected[:, 0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 4, 16, 24])
def test_lengths_and_resets_are_documents_run_alone(chunk: int) -> None:
    u, *system, h = draw(4, 50)
    lengths = [50, 33, 0, 16]
    resets = torch.zeros(4, 50, dtype=torch.bool)
    for row, at in ((0, 0), (0, 16), (0, 17), (0, 49), (1, 5), (1, 40), (2, 0), (3, 8), (3, 20)):
        resets[row, at] = True
    padded = u.clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = float("nan")
    y, after = state_space(padded, *system, h, Layout(torch.tensor(lengths), resets), chunk=chunk)
    for b, n in enumerate(lengths):
        state, cuts = h[b : b + 1], [p for p in range(n) if resets[b, p]]
        bounds = sorted({0, *cuts, n})
        for start, stop in itertools.pairwise(bounds):
            first = None if start in cuts else state
            expected, state = state_space_reference(u[b : b + 1, start:stop], *system, first)
            torch.testing.assert_close(y[b : b + 1, start:stop], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(after[b : b + 1], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool, strict: bool) -> None:
    leaves = [t.requires_grad_() for t in draw(2, 11, D=2, N=3)]
    layout = None
    if packed:
        resets = torch.zeros(2, 11, dtype=torch.bool)
        resets[0, [0, 5]] = True
        resets[1, 4] = True
        layout = Layout(torch.tensor([11, 7]), resets)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, after = state_space(*tensors, layout, strict, 4)
        valid = None if layout is None else layout.valid(11)
        return y if valid is None else y * valid[..., None], after

    assert torch.autograd.gradcheck(run, leaves)


def test_float32_keeps_its_digits_over_a_long_sequence() -> None:
    """A rotation that loses a ten-thousandth of its length a token: its powers must neither grow nor die early."""
    g = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(1, 16, 16, generator=g, dtype=torch.float64))[0] * (1 - 1e-4)
    u, B, C = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((1, 20000, 1), (1, 16), (1, 16)))
    y, _ = state_space(u, A, B, C)
    found, _ = state_space(*(t.float() for t in (u, A, B, C)))
    assert float((found - y).abs().max()) < 1e-3 * float(y.abs().max())


def test_states_carried_by_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an exported program, which has no loop over chunks."""
    u, *system, h = draw(3, 131)
    resets = torch.zeros(3, 131, dtype=torch.bool)
    resets[0, 40] = resets[2, 77] = resets[2, 78] = True
    layout = Layout(torch.tensor([131, 90, 100]), resets)
    expected = state_space(u, *system, h, layout, chunk=8)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for found, known in zip(state_space(u, *system, h, layout, chunk=8), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-11, atol=1e-11)


def test_shapes_that_do_not_fit_are_named() -> None:
    u, A, B, C, h = draw(2, 5)
    with pytest.raises(ValueError, match=r"B \(2, 5\)"):
        state_space(u, A, B[:2], C)
    with pytest.raises(ValueError, match="h is"):
        state_space(u, A, B, C, h[:1])

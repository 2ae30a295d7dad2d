"""The long convolution: FFT against the definition and scipy, in pieces, with everything a layout can say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import long_conv as module
from mmlong.ops.long_conv import fft_size, long_conv, long_conv_reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("B", "P", "L", "M"),
    [(1, 0, 1, 1), (3, 0, 63, 63), (1, 40, 1, 17), (2, 200, 1, 201), (3, 100, 257, 31), (2, 5, 64, 69)],
)
def test_fft_equals_the_definition(B: int, P: int, L: int, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    u, k, past = normal(B, L, 3), normal(M, 3, seed=1), normal(B, P, 3, seed=2)
    for elements in (1, 1 << 21):  # channels one by one, and all together
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(module, "TOKEN_ELEMENTS", elements)
        y, kept = long_conv(u, k, past, reach=M)
        torch.testing.assert_close(y, long_conv_reference(u, k, past), rtol=1e-11, atol=1e-11)
        inputs = torch.cat([past, u], 1)
        torch.testing.assert_close(kept, inputs[:, max(0, P + L - M + 1) :])


def test_against_scipy() -> None:
    u, k = normal(1, 257, 2), normal(257, 2, seed=1)
    y, _ = long_conv(u, k)
    for d in range(2):
        expected = scipy.signal.lfilter(k[:, d].numpy(), [1.0], u[0, :, d].numpy())
        np.testing.assert_allclose(y[0, :, d], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reach", [1, 2, 9, 64, None])
def test_pieces_equal_the_whole(reach: int | None) -> None:
    u, k = normal(2, 64, 3), normal(reach or 64, 3, seed=1)
    whole, kept = long_conv(u, k, reach=reach)
    past, parts = None, []
    for start, stop in itertools.pairwise([0, 1, 2, 30, 31, 64]):
        y, past = long_conv(u[:, start:stop], k, past, reach=reach)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(past, kept)


@pytest.mark.parametrize("reach", [12, None])
def test_lengths_and_resets_are_documents_run_alone(reach: int | None) -> None:
    lengths, later = [40, 27, 0, 16], 7
    u, more, past = normal(4, 40, 3), normal(4, later, 3, seed=3), normal(4, 10, 3, seed=2)
    k = normal(reach or 60, 3, seed=1)
    resets = torch.zeros(4, 40, dtype=torch.bool)
    for row, at in ((0, 0), (0, 16), (0, 17), (0, 39), (1, 5), (1, 33), (2, 0), (3, 8)):
        resets[row, at] = True
    padded = u.clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = float("nan")
    y, kept = long_conv(padded, k, past, Layout(torch.tensor(lengths), resets), reach)
    after, _ = long_conv(more, k, kept, reach=reach)
    for b, n in enumerate(lengths):
        one, before = slice(b, b + 1), past[b : b + 1]
        cuts = [p for p in range(n) if resets[b, p]]
        for start, stop in itertools.pairwise(sorted({0, *cuts, n})):
            before = before[:, :0] if start in cuts else before
            expected = long_conv_reference(u[one, start:stop], k, before)
            torch.testing.assert_close(y[one, start:stop], expected, rtol=1e-11, atol=1e-11)
            before = torch.cat([before, u[one, start:stop]], 1)
        torch.testing.assert_close(after[one], long_conv_reference(more[one], k, before), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("L", [1, 9])
def test_gradients(L: int, packed: bool) -> None:
    leaves = [t.requires_grad_() for t in (normal(2, L, 2), normal(6, 2, seed=1), normal(2, 4, 2, seed=2))]
    resets = torch.zeros(2, L, dtype=torch.bool)
    resets[0, [0, L // 2]] = True
    layout = Layout(torch.tensor([L, L // 2]), resets) if packed else None

    def run(u: Tensor, k: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        y, kept = long_conv(u, k, past, layout, 6 if L > 1 else 5)
        valid = None if layout is None else layout.valid(L)
        return y if valid is None else torch.where(valid[..., None], y, 0), kept

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_a_kept_past_does_not_live_in_the_inputs_memory() -> None:
    u, k = normal(1, 9, 2), normal(30, 2)
    _, first = long_conv(u, k)
    _, second = long_conv(u, k, first)
    expected = torch.cat([u, u], 1).clone()
    u.zero_()
    first.zero_()
    torch.testing.assert_close(second, expected)


def test_fft_sizes() -> None:
    for least in range(1, 600):
        assert fft_size(least) == min(o << a for o in (1, 3, 5) for a in range(11) if o << a >= least)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="at least 9 lags"):
        long_conv(normal(1, 9, 2), normal(8, 2))
    with pytest.raises(ValueError, match="past is"):
        long_conv(normal(2, 9, 2), normal(9, 2), normal(1, 3, 2))
